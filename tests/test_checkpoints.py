"""plumbing/checkpoints.py: names of weights, a run's folder, torn files."""
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from plumbing.checkpoints import (
    Checkpoint,
    base_of,
    check_folder,
    is_same_base,
    load_checkpoint,
    newest_run,
    parse_checkpoint,
    read_pointer,
    save_checkpoint,
    saved_epochs,
)
from plumbing.files import make_folder, write
from plumbing.options import UserError
from rivals import is_method


@pytest.mark.parametrize("text, parts, method, concept", [
    ("out/a", [("out/a", 1)], None, ""),
    ("base", [], None, ""),
    ("out/a@0.5", [("out/a", .5)], None, ""),
    ("out/a+out/b@0.5", [("out/a", 1), ("out/b", .5)], None, ""),
    ("out/a@-1+out/b", [("out/a", -1), ("out/b", 1)], None, ""),
    ("base+out/b", [("out/b", 1)], None, ""),
    ("out/a+sld-medium", [("out/a", 1)], "sld-medium", ""),
    ("base+negative", [], "negative", ""),
    ("base+negative:bare skin, a+b", [], "negative", "bare skin, a+b"),
    ("out/a+out/b@2+safree", [("out/a", 1), ("out/b", 2)], "safree", ""),
    ("out/a+b", [("out/a", 1), ("b", 1)], None, ""),
])
def test_a_checkpoints_name_is_read(text, parts, method, concept):
    assert parse_checkpoint(text, is_method) == Checkpoint(tuple(parts), method, concept)


def test_a_path_that_is_there_may_hold_a_plus_and_an_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a+b", "c@2", "sld-medium"):
        (tmp_path / name).mkdir()
    assert parse_checkpoint("a+b", is_method).parts == (("a+b", 1),)
    assert parse_checkpoint("a+b@3+c@2", is_method).parts == (("a+b", 3), ("c@2", 1))
    assert parse_checkpoint("sld-medium", is_method).parts == (("sld-medium", 1),)
    (tmp_path / "run+negative").mkdir()                 # a folder goes before a method
    assert parse_checkpoint("run+negative", is_method).parts == (("run+negative", 1),)


@pytest.mark.parametrize("text, sentence", [
    ("out/a@x", "weight 'x'; a LoRA takes a number"), ("out/a@nan", "weight 'nan'"),
    ("out/a@inf", "weight 'inf'"), ("base@0.5", "weight '0.5'"),
    ("out/a++out/b", "has an empty part"),
    ("+out/a", "has an empty part"), ("", "has an empty part")])
def test_a_name_that_can_not_be_read_is_a_sentence(text, sentence):
    with pytest.raises(UserError, match=f"--checkpoint: .*{sentence}"):
        parse_checkpoint(text, is_method)


def test_the_base_is_the_one_that_the_run_was_trained_from(tmp_path):
    (tmp_path / "args.json").write_text('{"model": "somebody/model"}')
    checkpoint = Checkpoint(((str(tmp_path), 1.),))
    assert base_of(checkpoint) == "somebody/model" and base_of(checkpoint, "mine") == "mine"
    assert base_of(Checkpoint()) == base_of(None) == "tiny"
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    (pipeline / "model_index.json").write_text("{}")
    assert base_of(Checkpoint(((str(pipeline), 1.), (str(tmp_path), 1.)))) == str(pipeline)


def test_the_newest_run_is_the_one_whose_weights_are_newest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, (name, model) in enumerate((("a", "x"), ("b", "tiny"), ("c", "tiny"))):
        folder = tmp_path / "out" / name
        folder.mkdir(parents=True)
        (folder / "args.json").write_text(json.dumps({"model": model}))
        if name != "c":                                 # c is not finished
            weights = folder / "pytorch_lora_weights.safetensors"
            weights.write_bytes(b"x")
            os.utime(weights, (i, i))
    assert newest_run() == "out/b" and newest_run("x") == "out/a" and newest_run("y") is None


def settings(folder, **more):
    own = {"output_dir": str(folder), "model": "tiny", "recipe": "embedded", "epochs": 3, "lr": .1}
    return SimpleNamespace(**{**own, **more})


def begin(args):
    """A run with these args that has saved something."""
    write(f"{args.output_dir}/args.json", check_folder(args))
    save_checkpoint(f"{args.output_dir}/checkpoints", {"epoch": 1})


def test_a_folder_is_new_or_this_very_runs(tmp_path):
    begin(settings(tmp_path / "run"))
    check_folder(settings(tmp_path / "run", epochs=9))
    with pytest.raises(UserError, match="holds another run .--lr was 0.1, is 0.2."):
        check_folder(settings(tmp_path / "run", lr=.2))


def test_a_run_that_saved_nothing_may_start_again_with_another_option(tmp_path):
    write(f"{tmp_path}/args.json", check_folder(settings(tmp_path)))
    assert json.loads(check_folder(settings(tmp_path, lr=.2)))["lr"] == .2


def test_a_run_is_found_again_from_another_directory(tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("a dog")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    begin(settings("run", prompts=["p.txt", "a cat"], benign=None))
    monkeypatch.chdir(tmp_path / "elsewhere")
    check_folder(settings("../run", prompts=["../p.txt", "a cat"], benign=None))
    with pytest.raises(UserError, match="holds another run .--prompts was"):
        check_folder(settings("../run", prompts=["../p.txt", "a cow"], benign=None))


def test_a_prompt_file_that_was_edited_is_noticed(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a dog")
    begin(settings(tmp_path / "run", prompts=[str(path)]))
    path.write_text("a cat")
    with pytest.raises(UserError, match="--prompts was .*, with another content"):
        check_folder(settings(tmp_path / "run", prompts=[str(path)]))


def test_a_model_is_one_by_its_files_and_not_by_its_path(pipeline, foreign_pipeline, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(pipeline, copy)
    assert is_same_base(str(copy), pipeline) and is_same_base(f"{copy}/../copy", str(copy))
    assert not is_same_base(str(copy), "tiny") and not is_same_base("some/hub", "other/hub")
    begin(settings(tmp_path / "run", model=pipeline))
    check_folder(settings(tmp_path / "run", model=str(copy)))
    (copy / "unet" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="--model was"):
        check_folder(settings(tmp_path / "run", model=str(copy)))


def test_a_folder_of_the_first_edition_is_refused_in_a_sentence(tmp_path):
    save_checkpoint(f"{tmp_path}/checkpoints", {"epoch": 1})
    (tmp_path / "args.json").write_text('{"model": "tiny", "lr": 0.1, "guide": "plain"}')
    with pytest.raises(UserError, match="made by this program's first edition"):
        check_folder(settings(tmp_path))


def test_a_torn_checkpoint_is_never_loaded(tmp_path, capsys):
    folder = str(tmp_path)
    for epoch in (1, 2, 3):
        save_checkpoint(folder, {"epoch": epoch, "weights": {"w": torch.ones(50)}}, limit=2)
    assert sorted(os.listdir(folder)) == ["epoch_0002.pt", "epoch_0003.pt", "latest.json"]
    newest, older = read_pointer(folder)
    with open(f"{folder}/{newest['file']}", "r+b") as file:
        file.truncate(100)
    assert load_checkpoint(folder)["epoch"] == 2
    os.remove(f"{folder}/{older['file']}")
    assert load_checkpoint(folder) is None
    assert "no checkpoint in" in capsys.readouterr().err
    (tmp_path / "latest.json").write_text("[{")
    assert load_checkpoint(folder) is None


def test_a_checkpoint_that_is_kept_outlives_the_limit(tmp_path):
    for epoch in range(1, 7):
        save_checkpoint(str(tmp_path), {"epoch": epoch}, limit=2, keep=2 if epoch > 2 else None)
    assert saved_epochs(str(tmp_path)) == [6, 5, 2]
    assert load_checkpoint(str(tmp_path), epoch=2) == {"epoch": 2}
    assert load_checkpoint(str(tmp_path))["epoch"] == 6
    assert load_checkpoint(str(tmp_path), epoch=3) is None


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    """/dev/full stands for a full disk: what is written there fails with ENOSPC."""
    path = tmp_path / "file"
    write(str(path), "first")
    os.symlink("/dev/full", f"{path}.tmp")
    with pytest.raises(UserError, match="No space left on device.*what was saved before stays"):
        write(str(path), "second")
    assert path.read_text() == "first"
    write(str(path), b"third")                          # the disk has room again
    assert path.read_bytes() == b"third"
    with pytest.raises(UserError, match="--output-dir: /proc/run can't be written"):
        make_folder("/proc/run")
