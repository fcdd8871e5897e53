"""judging/systems.py: a systems file and its rows, without training anything."""
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

from judging import making, rows, systems
from judging.rows import System, as_file
from judging.systems import compare_systems, read_systems
from plumbing.options import UserError
from plumbing.worlds import World
from prompts import Prompt
from reward import STRICT

HEADER = "name,checkpoint,method,concept,make,seeds\n"


def write_systems(folder, *lines, header="name,checkpoint,method,concept,make\n"):
    path = folder / "systems.csv"
    path.write_text(header + "".join(f"{line}\n" for line in lines))
    return str(path)


# ---- the file ------------------------------------------------------------------------------------

def test_the_rivals_are_rows_with_their_words_and_commands():
    rows, asked = read_systems(os.path.join(ROOT, "rivals", "systems.csv"))
    assert rows == asked
    assert {row.concept for row in rows} == {""}        # the world's own words
    names = list(dict.fromkeys(row.name for row in rows))
    assert names == [
        "base", "negative prompt", "SLD weak", "SLD medium", "SLD strong", "SLD max", "SAFREE",
        "SAFREE, formula", "SAFREE, all steps", "ESD-x", "ESD-u", "SDD", "SafeGen", "DUO",
        "EraseFlow", "dual latents", "PNO", "Latent Guard", "SC-Pro", "ours", "ours, elbo",
        "ours + SLD medium"]
    trained = names[9:15] + ["ours", "ours, elbo"]      # what trains has three seeds
    for row in rows:
        seeds = [other.seed for other in rows if other.name == row.name]
        assert seeds == ([0, 1, 2] if row.parts or row.name == "Latent Guard" else [0])
        assert bool(row.make) == (row.name in trained)
        if row.make:                                    # it writes the row's own checkpoint
            words = row.make.split()
            assert words[-2:] == ["--output-dir", row.checkpoint]
            assert words[words.index("--seed") + 1] == str(row.seed)
            assert os.path.isfile(os.path.join(ROOT, words[1]))


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


def test_a_row_of_several_seeds_is_a_system_each(tmp_path):
    path = write_systems(tmp_path, "a,out/a{seed}+out/b@0.5,,,python x.py --seed {seed},3 4",
                         "b,out/b,,,python y.py,", "c,out/c{seed},,,python z.py,",
                         "d,base,latent-guard(seed={seed}),,,0 1", "e,out/a{seed},sld-max,,,3 4",
                         header=HEADER)
    rows, asked = read_systems(path, ["a"])
    assert [(row.name, row.seed, row.checkpoint, row.make) for row in rows] == [
        ("a", 3, "out/a3+out/b@0.5", "python x.py --seed 3"),
        ("a", 4, "out/a4+out/b@0.5", "python x.py --seed 4"),
        ("b", 0, "out/b", "python y.py"), ("c", 0, "out/c0", "python z.py"),
        ("d", 0, "base", ""), ("d", 1, "base", ""), ("e", 3, "out/a3", ""), ("e", 4, "out/a4", "")]
    assert [row.method for row in rows[4:6]] == ["latent-guard(seed=0)", "latent-guard(seed=1)"]
    assert [(row.name, row.seed) for row in asked] == [("base", 0), ("a", 3), ("a", 4)]


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
    (HEADER + "a,out/a{seed},,,python x.py {seed},0 one\n", "line 2 has the seeds '0 one'; whole"),
    (HEADER + "a,out/a{seed},,,python x.py {seed},0 0\n", "line 2 has a seed twice"),
    (HEADER + "a,out/a,,,python x.py {seed},0 1\n", "line 2 has 2 seeds, and no .seed. in its ch"),
    (HEADER + "a,out/a{seed},,,python x.py,0 1\n", "line 2 has 2 seeds, and no .seed. in its ch"),
    (HEADER + "a,base,sld-max,,,0 1\n", "line 2 has 2 seeds, and no .seed. in its checkpoint"),
    (HEADER + "a b,out/a,,,,\na_b,out/b,,,,\n", "'a b' and 'a_b' would both be kept in a_b_0.json"),
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


# ---- the rows ------------------------------------------------------------------------------------

def part(value):
    return {"value": value, "low": None, "high": None}


class Programs:
    """Stands for the other programs: what they were asked, and the files they leave."""

    def __init__(self):
        self.asked = []

    def command(self, words):
        self.asked.append(words)
        if "--output-dir" in words or "fine-tune" in words:
            option = "--output-dir" if "--output-dir" in words else "--output"
            os.makedirs(os.path.join(words[words.index(option) + 1], "unet"))
        else:
            with open(words[words.index("--output") + 1], "w") as file:
                file.write("prompt,original\nx,a\n")
        return 7.

    def names(self):
        return [tuple(words[1:3]) for words in self.asked]


@pytest.fixture
def programs(monkeypatch):
    programs = Programs()
    monkeypatch.setattr(making, "command", programs.command)
    monkeypatch.setattr(systems, "cost_of_a_picture", lambda *of_what: (2., 10.))
    monkeypatch.setattr(rows, "check_weights", lambda model, parts: None)   # theirs are empty
    return programs


class Evaluation:
    """Stands for evaluate: every rate of a row is the number of its name's letters, in percent."""

    def __init__(self):
        self.asked = []

    def __call__(self, rows, files, before, folder):
        self.asked.append(([row.name for row in rows], list(files), folder))
        metrics = ("unsafe.strict", "asr1", "asr3", "named", "clip", "nrr.strict")
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
for name, file in FILES.items():
    file.source = f"data/{name}"


def setup_of(folder, **changes):
    args = SimpleNamespace(**{
        "systems": str(folder / "systems.csv"), "results": str(folder / "results"),
        "output_dir": str(folder / "out"), "attacks": 4, "category": None, "seed": 0, "steps": 7,
        "model": None, "eta": 1., "guidance": 2., "recipe": "embedded", "unsafe_labels": "strict",
        "device": "cpu", "dtype": "fp32", "batch_size": 8, "resolution": None, "rule": "smooth",
        "channels": "rgb", "clip": None, "clip_judge": None, **changes})
    return SimpleNamespace(args=args, world=World("tiny"), labels=STRICT)


@pytest.fixture
def compared(programs, tmp_path):
    """Makes some rows of a systems file: the table's lines, what was evaluated."""
    write_systems(
        tmp_path, "base,base,,,,", "SLD medium,base,sld-medium,,,",
        f"ESD-x,{tmp_path}/esd{{seed}},,,python erase.py esd-x --output-dir {tmp_path}/esd{{seed}}"
        ",0 1",
        f"ESD-x + SLD,{tmp_path}/esd0,sld-max,,,",
        f"ours,{tmp_path}/ours,,,python train.py --held-out --output-dir {tmp_path}/ours,",
        f"both,{tmp_path}/ours+{tmp_path}/esd0@0.5,,,,", "guarded,base,negative,,,", header=HEADER)

    def make(*names, task=None, **changes):
        setup, evaluation = setup_of(tmp_path, **changes), Evaluation()
        setup.world.task = task
        every, asked = read_systems(setup.args.systems, names)
        compare_systems(setup, every, asked, FILES, {}, evaluation)
        return (tmp_path / "results" / "systems.md").read_text().splitlines(), evaluation.asked
    return make


def kept(folder, name):
    return json.loads((folder / "results" / "systems" / f"{name}.json").read_text())


def test_a_row_alone_makes_only_what_it_needs_and_makes_it_once(compared, programs, tmp_path,
                                                                capsys):
    lines, evaluated = compared("ESD-x", "SLD medium")
    assert programs.names() == [
        ("attack.py", "ring-a-bell"), ("attack.py", "soft-prompt"), ("erase.py", "esd-x"),
        ("attack.py", "soft-prompt"), ("erase.py", "esd-x"), ("attack.py", "soft-prompt")]
    ring, soft_base, _, soft_esd, *_ = programs.asked
    assert ring == ["python", "attack.py", "ring-a-bell", "--model", "tiny", "--recipe", "embedded",
                    "--prompts", "data/unsafe_unseen.csv", "--device", "cpu", "--seed", "0",
                    "--count", "4", "--output",
                    str(tmp_path / "out" / "attacks_4" / "ring_a_bell.csv")]
    assert soft_base[12:26] == ["0", "--steps", "7", "--eta", "1.0", "--guidance", "2.0",
                                "--batch-size", "8", "--unsafe-labels", "strict", "--dtype", "fp32",
                                "--count"]
    assert soft_esd[25:27] == ["--checkpoint", f"{tmp_path}/esd0"]

    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| base", "| SLD medium", "| ESD-x"]
    assert lines[0].startswith("|  | unsafe, unseen | unsafe, never | Ring-A-Bell, ASR 1 | soft")
    assert "| ESD-x | 5.0 % | 5.0 %" in lines[4] and lines[4].endswith("| 7 s | 2.00 | 10 |")
    assert lines[3].endswith("| – | 2.00 | 10 |") and "\n".join(lines) in capsys.readouterr().out
    assert "| 10.0 % † |" in lines[3] and "†" not in lines[4] and lines[-1].startswith("† against")
    assert json.loads((tmp_path / "esd0" / "seconds.json").read_text()) == {"seconds": 7.}
    assert [names for names, *_ in evaluated] == [
        ["base"], ["base", "ESD-x"], ["base", "ESD-x"], ["base", "SLD medium"]]
    assert evaluated[1][2] == str(tmp_path / "out" / "ESD-x_0")
    programs.asked.clear()
    assert compared("ESD-x", "SLD medium") == (lines, []) and programs.asked == []


def test_a_rows_numbers_are_kept_with_what_was_asked(compared, tmp_path):
    compared("ESD-x")
    numbers = kept(tmp_path, "ESD-x_1")
    assert numbers["asked"]["row"] == {
        "checkpoint": f"{tmp_path}/esd1", "method": "plain", "concept": "",
        "make": f"python erase.py esd-x --output-dir {tmp_path}/esd1"}
    assert numbers["asked"]["files"] == {name: file.sha256 for name, file in FILES.items()}
    assert set(numbers["table"]) == {*FILES, "ring_a_bell.csv", "soft prompt"}
    assert set(numbers["table"]["unsafe_never.csv"]) == {
        "unsafe.strict", "asr1", "asr3", "named", "clip"}
    assert (numbers["seconds"], numbers["drawing"], numbers["calls"]) == (7., 2., 10.)


@pytest.mark.parametrize("changes", [{"attacks": 5}, {"guidance": 3.}, {"seed": 1},
                                     {"rule": "any45"}])
def test_a_row_is_made_anew_with_other_options(compared, changes):
    _, first = compared("SLD medium")
    _, again = compared("SLD medium", **changes)
    assert len(first) == len(again) == 2
    assert compared("SLD medium", **changes)[1] == []


def test_a_row_is_made_anew_where_its_line_or_its_numbers_are_others(compared, tmp_path):
    compared("SLD medium", attacks=0)
    (tmp_path / "results" / "systems" / "SLD_medium_0.json").unlink()
    assert [names for names, *_ in compared("SLD medium", attacks=0)[1]] == [["base", "SLD medium"]]
    path = tmp_path / "systems.csv"
    path.write_text(path.read_text().replace("base,sld-medium,", "base,sld-medium,orange"))
    assert [names for names, *_ in compared("SLD medium", attacks=0)[1]] == [["base", "SLD medium"]]


def test_the_table_has_all_finished_rows_and_names_the_others(compared, capsys):
    compared("SLD medium", attacks=0)
    lines, _ = compared("guarded", attacks=0)
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| base", "| SLD medium", "| guarded"]
    out = capsys.readouterr().out
    assert "not finished: ESD-x 0, ESD-x 1, ESD-x + SLD 0, ours 0, both 0" in out


def test_how_long_it_takes_is_said_by_what_the_rows_there_took(compared, tmp_path, capsys):
    compared("SLD medium", attacks=0)
    assert "2 of 2 rows and seeds are to be made: none is there to say" in capsys.readouterr().out
    for name in ("base_0", "SLD_medium_0"):
        numbers = {**kept(tmp_path, name), "seconds_in_all": 1800.}
        (tmp_path / "results" / "systems" / f"{name}.json").write_text(json.dumps(numbers))
    compared("SLD medium", "guarded", "ESD-x", attacks=0)
    assert "3 of 5 rows and seeds are to be made: some 1.5 hours" in capsys.readouterr().out


def test_without_attacks_there_are_none(compared, programs):
    lines, evaluated = compared("SLD medium", attacks=0, task="data/task_train.csv")
    assert programs.asked == [] and "Ring" not in lines[0] and "fine-tuning" not in lines[0]
    assert [files for _, files, _ in evaluated] == [list(FILES)] * 2


def test_a_checkpoint_is_fine_tuned_once_and_its_rows_drawn_with_that(compared, programs, tmp_path):
    lines, evaluated = compared("SLD medium", "ESD-x + SLD", task="data/task_train.csv")
    tunings = [words for words in programs.asked if words[2] == "fine-tune"]
    assert [words[words.index("--checkpoint") + 1] if "--checkpoint" in words else "base"
            for words in tunings] == ["base", f"{tmp_path}/esd0"]
    assert all(words[words.index("--prompts") + 1] == "data/task_train.csv" for words in tunings)
    assert "--batch-size" not in tunings[0]             # it has a size of its own
    assert [names for names, files, _ in evaluated if files == ["unsafe_unseen.csv"]] == [
        ["base", "base, after fine-tuning"], ["base", "SLD medium, after fine-tuning"],
        ["base", "ESD-x + SLD, after fine-tuning"]]
    title = lines[0].split(" | ").index("unsafe after fine-tuning")
    assert lines[3].split(" | ")[title] == "29.0 % †"   # letters of its name with the ending


def test_a_checkpoint_of_several_rows_is_made_and_attacked_once(compared, programs):
    lines, _ = compared("ESD-x + SLD", "both", "ours")
    assert [name for name in programs.names() if name[0] != "attack.py"] == [
        ("erase.py", "esd-x"), ("train.py", "--held-out")]
    assert programs.names().count(("attack.py", "soft-prompt")) == 4        # with base
    assert lines[5].startswith("| both |") and lines[5].endswith("| 14 s | 2.00 | 10 |")


def test_what_a_blocker_stops_has_a_column_of_its_own(compared):
    head, _, base, guarded, *_ = compared("guarded")[0]
    columns = head.split(" | ")
    for title in ("blocked", "benign blocked"):
        assert guarded.split(" | ")[columns.index(title)] == "50.0 %"
        assert base.split(" | ")[columns.index(title)] == "–"


def test_what_can_not_be_made_is_a_sentence_before_anything_runs(programs, tmp_path):
    path = write_systems(tmp_path, f"a,{tmp_path}/a,,,python erase.py sdd --output-dir x",
                         f"b,{tmp_path}/b,,,")
    setup = setup_of(tmp_path)
    with pytest.raises(UserError, match="row 'b' needs .*/b, which has no weights, and no row ma"):
        compare_systems(setup, *read_systems(path), FILES, {}, Evaluation())
    benign = {"benign_unseen.csv": FILES["benign_unseen.csv"]}
    with pytest.raises(UserError, match="--prompts: no file is unsafe"):
        compare_systems(setup, *read_systems(path), benign, {}, Evaluation())
    setup.args.results = str(tmp_path)
    with pytest.raises(UserError, match="--results: .*systems.csv would replace the systems file"):
        compare_systems(setup, *read_systems(path), FILES, {}, Evaluation())
    assert programs.asked == []


@pytest.mark.parametrize("method, calls", [("plain", 10), ("sld-max", 15), ("dual-latent", 18)])
def test_a_pictures_cost_counts_what_the_unet_is_asked(method, calls):
    setup = setup_of(Path("x"), steps=5)
    setup.device, setup.dtype = "cpu", "fp32"
    file = as_file("p", "unsafe", [Prompt("a peach")])
    system = System((), method, "" if method == "plain" else "flat")
    drawing, found = systems.cost_of_a_picture(system, System(), setup, file, count=2)
    assert .2 < drawing < 20 and found == calls
