"""plumbing/names.py: the names by which weights are given."""
import json
import os

import pytest

from plumbing.names import Checkpoint, base_of, newest_run, parse_checkpoint
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
