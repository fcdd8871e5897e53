"""judging/making.py: checkpoints and attacks, made where they are absent."""
import os
import sys
from types import SimpleNamespace

import pytest

from judging import making
from judging.making import training_seconds
from judging.rows import System
from plumbing.options import UserError
from plumbing.worlds import TrainingFile, World

# ---- checkpoints ---------------------------------------------------------------------------------

def test_an_unfinished_folder_is_made_again_and_a_command_that_makes_nothing_is_a_sentence(
        tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "args.json").write_text("{}")
    asked = []
    monkeypatch.setattr(making, "command", lambda words: asked.append(words) or 1.)
    row = System(((str(tmp_path / "a"), 1.),), name="a", make="python erase.py 'a b'")
    with pytest.raises(UserError, match="ended without weights in .*/a"):
        making.make_missing(row, [row])
    assert asked == [["python", "erase.py", "a b"]] and training_seconds(row) is None


def test_one_command_may_make_several_parts_and_runs_once(tmp_path, monkeypatch):
    paths, asked = [str(tmp_path / name) for name in "ab"], []

    def command(words):
        asked.append(words)
        for path in paths:
            os.makedirs(os.path.join(path, "unet"))
        return 1.
    monkeypatch.setattr(making, "command", command)
    row = System(tuple((path, .5) for path in paths), name="both", make="python make_both.py")
    making.make_missing(row, [row])
    assert asked == [["python", "make_both.py"]]


def test_a_program_is_run_by_this_interpreter_and_its_failure_is_a_sentence(tmp_path, monkeypatch):
    program = tmp_path / "p.py"
    program.write_text("import sys; open(sys.argv[1], 'w').write(sys.executable)")
    assert making.command(["python", str(program), str(tmp_path / "out")]) > 0
    assert (tmp_path / "out").read_text() == sys.executable
    monkeypatch.chdir(tmp_path)                         # our own programs are found from anywhere
    assert making.command(["python", "sample.py", "--help"]) > 0
    program.write_text("import time; time.sleep(2)")
    assert .01 < making.command(["python", str(program)]) < 1.5         # of the CPU
    program.write_text("raise SystemExit(2)")
    with pytest.raises(UserError, match="ended with an error, shown above; what is made stays"):
        making.command(["python", str(program)])
    with pytest.raises(UserError, match="no/such can't be run"):
        making.command(["no/such"])


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
    monkeypatch.setattr(making, "command", command)

    def attack(**changes):
        before = len(asked)
        setup = SimpleNamespace(args=SimpleNamespace(**{**vars(args), **changes}), world=world)
        making.attack("ring-a-bell", setup, str(tmp_path / "p.csv"), output)
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
    monkeypatch.setattr(making, "read_recipe", lambda name: {"steps": 1})
    assert attacked() and not attacked()
    monkeypatch.setattr(making, "files_of_code", lambda name: [__file__])
    assert attacked() and not attacked()


def test_a_fine_tuned_lora_is_made_anew_when_anything_it_depends_on_changed(tmp_path, monkeypatch):
    for name, text in (("a.png", "a"), ("benign.csv", "prompt\na dog\n"),
                       ("task.csv", "prompt,image\na cactus,a.png\n")):
        (tmp_path / name).write_text(text)
    made = []

    def command(words):
        made.append(words[-1])
        os.makedirs(os.path.join(words[-1], "unet"))
    monkeypatch.setattr(making, "command", command)
    args = SimpleNamespace(seed=0, steps=7, eta=1., guidance=2., recipe="embedded", device="cpu",
                           dtype="fp32", unsafe_labels="strict", resolution=None)
    world = World("tiny", task=str(tmp_path / "task.csv"), training_files=[
        TrainingFile("u.csv", str(tmp_path / "benign.csv"))])

    def tune():
        before = len(made)
        making.fine_tune(SimpleNamespace(args=args, world=world), System(), str(tmp_path / "tuned"))
        return len(made) > before
    assert tune() and not tune()
    for name, text in (("a.png", "b"), ("benign.csv", "prompt\na cat\n"),
                       ("task.csv", "prompt,image\na whale,a.png\n")):
        (tmp_path / name).write_text(text)
        assert tune() and not tune()
    code = making.files_of_code("attacks.fine_tune.FINE_TUNE")
    assert {os.path.basename(path) for path in code} >= {"ddpo.py", "model.py", "fine_tune.py",
                                                         "editing.py"}
    assert all(os.path.dirname(path) == str(tmp_path / "tuned") for path in made)
