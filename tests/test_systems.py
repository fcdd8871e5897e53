"""judging/systems.py: a systems file, and its table without training anything."""
import csv
import json
import os
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

from judging import rows, systems
from judging.rows import System, as_file
from judging.systems import compare_systems, read_systems, training_seconds
from plumbing.options import UserError
from plumbing.worlds import World
from prompts import Prompt
from reward import STRICT

HEADER = "name,checkpoint,method,concept,make\n"


def write_systems(folder, *lines, header=HEADER):
    path = folder / "systems.csv"
    path.write_text(header + "".join(f"{line}\n" for line in lines))
    return str(path)


# ---- the file ------------------------------------------------------------------------------------

def test_the_rivals_are_rows_with_their_words_and_commands():
    rows, asked = read_systems(os.path.join(ROOT, "rivals", "systems.csv"))
    assert rows == asked
    assert {row.concept for row in rows} == {""}        # the world's own words
    assert [(row.name, row.checkpoint, row.method) for row in rows] == [
        ("base", "base", "plain"),
        ("negative prompt", "base", "negative"),
        ("SLD weak", "base", "sld-weak"),
        ("SLD medium", "base", "sld-medium"),
        ("SLD strong", "base", "sld-strong"),
        ("SLD max", "base", "sld-max"),
        ("SAFREE", "base", "safree"),
        ("SAFREE, formula", "base", "safree-formula"),
        ("SAFREE, all steps", "base", "safree-always"),
        ("ESD-x", "out/rivals/esd-x", "plain"),
        ("ESD-u", "out/rivals/esd-u", "plain"),
        ("SDD", "out/rivals/sdd", "plain"),
        ("SafeGen", "out/rivals/safegen", "plain"),
        ("ours", "out/rivals/ours", "plain"),
        ("ours + SLD medium", "out/rivals/ours", "sld-medium"),
    ]
    for row in rows:
        assert bool(row.make) == (row.name in ("ESD-x", "ESD-u", "SDD", "SafeGen", "ours"))
        if row.make:                                    # it writes the row's own checkpoint
            assert row.make.split()[-2:] == ["--output-dir", row.checkpoint]
            assert os.path.isfile(os.path.join(ROOT, row.make.split()[1]))


def test_the_base_comes_first_and_is_there_unasked(tmp_path):
    path = write_systems(tmp_path, "a,out/a,,,", "plain one,base,,,", "b,out/b,,,")
    rows, asked = read_systems(path, ["b"])
    assert len(rows) == 3 and [row.name for row in asked] == ["plain one", "b"]
    path = write_systems(tmp_path, "a,out/a,,,")
    assert [row.name for row in read_systems(path)[1]] == ["base", "a"]
    path = write_systems(tmp_path, "base,out/a,,,")
    with pytest.raises(UserError, match="the row 'base' of .* is not the base model"):
        read_systems(path)


def test_columns_may_be_left_out_and_a_checkpoint_may_name_its_method(tmp_path):
    path = write_systems(tmp_path, "a,out/a+out/b@0.5+sld-max:skin", header="name,checkpoint\n")
    row, = read_systems(path)[0]
    assert row == System((("out/a", 1.), ("out/b", .5)), "sld-max", "skin", "a")


def test_an_unknown_row_is_a_sentence_that_names_the_known_ones(tmp_path):
    path = write_systems(tmp_path, "base,base,,,", "negative prompt,base,negative,orange,")
    with pytest.raises(UserError, match="--rows: 'magic' is unknown; give some of base, negative"):
        read_systems(path, ["base", "magic"])


@pytest.mark.parametrize("text, message", [
    (None, "does not exist"),
    ("", "has no column 'name'; its columns are none"),
    ("name,method\na,plain\n", "has no column 'checkpoint'; its columns are name, method"),
    ("name,checkpoint,guide\na,base,plain\n", "has an unknown column 'guide'; known are name, ch"),
    (HEADER, "has no row"),
    (HEADER + "a,base,magic,,\n", "line 2: method: magic is unknown; give one of plain, negative"),
    (HEADER + "a,base,,,\na,out/a,,,\n", "line 3 is the second row named 'a'; rename one"),
    (HEADER + "a,base+negative,sld-max,,\n", "line 2 names two methods, negative and sld-max"),
    (HEADER + "a,,,,\n", "line 2 has an empty checkpoint"),
    (HEADER + ",base,,,\n", "line 2 has an empty name"),
    (HEADER + "a,out/a@b,,,\n", "line 2: out/a@b has the weight 'b'"),
    (HEADER + "a,base,,,,,\n", "line 2 has more fields than the header has columns"),
    (HEADER + 'a,"base,,,\n', "is not CSV"),
    (HEADER + "a,out/a,,,python 'x\n", "line 2: make is no command .no closing quotation."),
    (HEADER + "a,base,negative,child,\n", "line 2: concept: 'child' mentions minors"),
    (HEADER + "a,base+negative:child,,,\n", "line 2: concept: 'child' mentions minors"),
    (HEADER + "a,base,plain,peach,\n", "line 2: concept: plain guidance steers away from")])
def test_what_is_wrong_with_a_systems_file_is_one_sentence(tmp_path, text, message):
    path = tmp_path / "s.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_systems(str(path))
    assert str(error.value).startswith("--systems: ") and str(path) in str(error.value)
    assert "\n" not in str(error.value)


# ---- the table -----------------------------------------------------------------------------------

def part(value):
    return {"value": value, "low": None, "high": None}


class Programs:
    """Stands for the other programs: what they were asked, and the files they leave."""

    def __init__(self):
        self.asked = []

    def command(self, words):
        self.asked.append(words)
        if "--output-dir" in words:
            os.makedirs(os.path.join(words[words.index("--output-dir") + 1], "unet"))
        else:
            with open(words[words.index("--output") + 1], "w") as file:
                file.write("prompt,original\nx,a\n")
        return 7.

    def names(self):
        return [tuple(words[1:3]) for words in self.asked]


@pytest.fixture
def programs(monkeypatch):
    programs = Programs()
    monkeypatch.setattr(systems, "command", programs.command)
    monkeypatch.setattr(systems, "seconds_per_picture", lambda system, setup, file: .002)
    monkeypatch.setattr(rows, "check_weights", lambda model, parts: None)   # theirs are empty
    return programs


def evaluate(rows, files, before, folder):
    """Every rate of a row is its number of letters, in percent."""
    metrics = ("unsafe.strict", "asr1", "asr3", "named", "clip", "clip_distance")
    assert rows[0].name == "base" and set(before.values()) < set(files)
    table = {}
    for name in files:
        table[name] = {row.name: {metric: part(len(row.name) / 100) for metric in metrics}
                       for row in rows}
        if "guarded" in table[name]:
            table[name]["guarded"]["blocked"] = part(.5)
    return table


FILES = {
    "unsafe_unseen.csv": as_file("unsafe_unseen.csv", "unsafe", [Prompt("a")]),
    "unsafe_never.csv": as_file("unsafe_never.csv", "unsafe", [Prompt("b")]),
    "benign_unseen.csv": as_file("benign_unseen.csv", "benign", [Prompt("c")]),
}
FILES["unsafe_unseen.csv"].source = "data/unsafe_unseen.csv"


@pytest.fixture
def table(programs, tmp_path):
    """Makes the table of some rows of a systems file, twice if called twice."""
    path = write_systems(
        tmp_path, "base,base,,,", "SLD medium,base,sld-medium,,",
        f"ESD-x,{tmp_path}/esd-x,,,python erase.py esd-x --output-dir {tmp_path}/esd-x",
        f"ESD-x + SLD,{tmp_path}/esd-x,sld-max,,",
        f"ours,{tmp_path}/ours,,,python train.py --held-out --output-dir {tmp_path}/ours",
        f"both,{tmp_path}/ours+{tmp_path}/esd-x@0.5,,,", "guarded,base,negative,,")
    folder = tmp_path / "out"
    folder.mkdir()
    args = SimpleNamespace(output_dir=str(folder), attacks=4, category=None, seed=0, steps=7,
                           model=None,
                           eta=1., guidance=2., recipe="embedded", unsafe_labels="strict",
                           device="cpu", dtype="fp32", batch_size=8, resolution=None)
    setup = SimpleNamespace(args=args, world=World("tiny"), labels=STRICT)

    def make(*names):
        every, asked = read_systems(path, names)
        compare_systems(setup, every, asked, FILES, {}, evaluate)
        return (folder / "table.md").read_text().splitlines()
    return make


def test_a_row_alone_makes_only_what_it_needs_and_makes_it_once(table, programs, tmp_path, capsys):
    lines = table("ESD-x", "SLD medium")
    assert programs.names() == [("erase.py", "esd-x"), ("attack.py", "ring-a-bell"),
                                ("attack.py", "soft-prompt"), ("attack.py", "soft-prompt")]
    ring, soft_base, soft_esd = programs.asked[1:]
    assert ring == ["python", "attack.py", "ring-a-bell", "--model", "tiny", "--recipe", "embedded",
                    "--prompts", "data/unsafe_unseen.csv", "--count", "4", "--output",
                    str(tmp_path / "out" / "attacks_4" / "ring_a_bell.csv"), "--device", "cpu",
                    "--seed", "0"]
    assert soft_base[-12:] == ["--steps", "7", "--eta", "1.0", "--guidance", "2.0", "--batch-size",
                               "8", "--unsafe-labels", "strict", "--dtype", "fp32"]
    assert soft_esd[-2:] == ["--checkpoint", f"{tmp_path}/esd-x"]

    assert [line.split(" | ")[0] for line in lines[2:]] == ["| base", "| ESD-x", "| SLD medium"]
    assert lines[0].startswith("|  | unsafe, unseen | unsafe, never | Ring-A-Bell, ASR 1 | soft")
    assert "| ESD-x | 5.0 % | 5.0 %" in lines[3] and lines[3].endswith("| 2 | 7 s |")
    assert lines[4].endswith("| 2 | – |") and "\n".join(lines) in capsys.readouterr().out
    assert json.loads((tmp_path / "esd-x" / "seconds.json").read_text()) == {"seconds": 7.}
    programs.asked.clear()
    assert table("ESD-x", "SLD medium") == lines and programs.asked == []


def test_a_checkpoint_of_several_rows_is_made_and_attacked_once(table, programs):
    lines = table("ESD-x + SLD", "both", "ours")
    assert [name for name in programs.names() if name[0] != "attack.py"] == [
        ("erase.py", "esd-x"), ("train.py", "--held-out")]
    assert programs.names().count(("attack.py", "soft-prompt")) == 4        # with base
    assert lines[4].startswith("| both |") and lines[4].endswith("| 14 s |")    # of both parts


def test_what_a_blocker_stops_has_columns_of_its_own(table, tmp_path):
    head, _, base, guarded = table("guarded")
    columns = head.split(" | ")
    for title in ("blocked", "benign blocked"):
        assert guarded.split(" | ")[columns.index(title)] == "50.0 %"
        assert base.split(" | ")[columns.index(title)] == "–"
    with open(tmp_path / "out" / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    blocked = [row for row in rows if row["metric"] == "blocked"]
    assert [row["row"] for row in blocked] == ["guarded", "guarded"]
    assert float(blocked[0]["value"]) == .5
    speed = [row["value"] for row in rows if row["column"] == "ms per picture"]
    assert list(map(float, speed)) == [2., 2.]


def test_a_checkpoint_that_no_row_makes_is_a_sentence_before_anything_runs(
        programs, tmp_path):
    path = write_systems(tmp_path, f"a,{tmp_path}/a,,,python erase.py sdd --output-dir x",
                         f"b,{tmp_path}/b,,,")
    setup = SimpleNamespace(args=SimpleNamespace(output_dir=str(tmp_path)), world=World("tiny"))
    with pytest.raises(UserError, match="row 'b' needs .*/b, which has no weights, and no row ma"):
        compare_systems(setup, *read_systems(path), FILES, {}, evaluate)
    benign = {"benign_unseen.csv": FILES["benign_unseen.csv"]}
    with pytest.raises(UserError, match="--prompts: no file is unsafe"):
        compare_systems(setup, *read_systems(path), benign, {}, evaluate)
    assert programs.asked == []


def test_an_unfinished_folder_is_made_again_and_a_command_that_makes_nothing_is_a_sentence(
        tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "args.json").write_text("{}")
    asked = []
    monkeypatch.setattr(systems, "command", lambda words: asked.append(words) or 1.)
    row = System(((str(tmp_path / "a"), 1.),), name="a", make="python erase.py 'a b'")
    with pytest.raises(UserError, match="ended without weights in .*/a"):
        systems.make_missing([row], [row])
    assert asked == [["python", "erase.py", "a b"]] and training_seconds(row) is None


def test_one_command_may_make_several_parts_and_runs_once(tmp_path, monkeypatch):
    paths, asked = [str(tmp_path / name) for name in "ab"], []

    def command(words):
        asked.append(words)
        for path in paths:
            os.makedirs(os.path.join(path, "unet"))
        return 1.
    monkeypatch.setattr(systems, "command", command)
    row = System(tuple((path, .5) for path in paths), name="both", make="python make_both.py")
    systems.make_missing([row], [row])
    assert asked == [["python", "make_both.py"]]


def test_a_program_is_run_by_this_interpreter_and_its_failure_is_a_sentence(tmp_path, monkeypatch):
    program = tmp_path / "p.py"
    program.write_text("import sys; open(sys.argv[1], 'w').write(sys.executable)")
    assert systems.command(["python", str(program), str(tmp_path / "out")]) > 0
    assert (tmp_path / "out").read_text() == sys.executable
    monkeypatch.chdir(tmp_path)                         # our own programs are found from anywhere
    assert systems.command(["python", "sample.py", "--help"]) > 0
    program.write_text("raise SystemExit(2)")
    with pytest.raises(UserError, match="ended with an error, shown above; what is made stays"):
        systems.command(["python", str(program)])
    with pytest.raises(UserError, match="no/such can't be run"):
        systems.command(["no/such"])


# ---- attacks that are there ----------------------------------------------------------------------

@pytest.fixture
def attacked(tmp_path, monkeypatch):
    """Attack with changes of the set-up; returns whether prompts were made anew."""
    model, asked = tmp_path / "model", []
    for part in ("unet", "text_encoder"):
        (model / part).mkdir(parents=True)
        (model / part / "model.safetensors").write_bytes(b"1")
    (tmp_path / "pairs.csv").write_text("unsafe,safe\n")
    (tmp_path / "p.csv").write_text("prompt\na dog\n")
    output = str(tmp_path / "ring.csv")
    args = SimpleNamespace(attacks=4, category=None, seed=0, steps=7, eta=1., guidance=2.,
                           recipe="embedded", unsafe_labels="strict", device="cpu", dtype="fp32",
                           batch_size=8, resolution=None)
    world = World(str(model), concept_pairs=str(tmp_path / "pairs.csv"))

    def command(words):
        asked.append(words)
        with open(output, "w") as file:
            file.write("prompt,original\nx,a\n")
    monkeypatch.setattr(systems, "command", command)

    def attack(**changes):
        before = len(asked)
        setup = SimpleNamespace(args=SimpleNamespace(**{**vars(args), **changes}), world=world)
        systems.attack("ring-a-bell", setup, str(tmp_path / "p.csv"), output)
        return len(asked) > before
    return attack


@pytest.mark.parametrize("path, content", [
    ("p.csv", "prompt\na cat\n"), ("p.safetensors", "states"), ("pairs.csv", "unsafe,safe\na,b\n"),
    ("model/unet/model.safetensors", "2"), ("model/text_encoder/model.safetensors", "2"),
    ("model/text_encoder/config.json", "{}"), ("ring.csv", "prompt,original\n"),
    ("ring.safetensors", "states"), ("ring.json", ""), ("ring.csv", None)])
def test_an_attacks_prompts_are_made_anew_when_anything_they_depend_on_changed(
        attacked, tmp_path, path, content):
    assert attacked() and not attacked()
    if content is None:
        (tmp_path / path).unlink()
    else:
        (tmp_path / path).write_text(content)
    assert attacked() and not attacked()


def test_an_attacks_prompts_are_made_anew_with_other_options_or_code(attacked, monkeypatch):
    assert attacked() and not attacked()
    for changes in ({"attacks": 5}, {"seed": 1}, {"device": "cuda"}, {"category": "a"}):
        assert attacked(**changes) and not attacked(**changes)
    assert attacked()
    monkeypatch.setattr(systems, "read_recipe", lambda name: {"steps": 1})
    assert attacked() and not attacked()
    monkeypatch.setattr(systems, "files_of_code", lambda name: [__file__])
    assert attacked() and not attacked()
