"""plumbing/training_prompts.py: what is trained on, watched, kept back and judged."""
import json
from types import SimpleNamespace

import pytest

from plumbing.options import UserError
from plumbing.training_prompts import (
    TrainingPrompts,
    keep_back,
    prompt_table,
    training_prompts,
)
from prompts import Prompt, read


def file(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def args_of(pipeline, tmp_path, **given):
    options = dict(model=pipeline, prompts=None, benign=None, held_out=None, category=None,
                   benign_share=.25, output_dir=str(tmp_path / "run"))
    return SimpleNamespace(**{**options, **given})


def test_a_tenth_of_the_prompts_is_kept_back_and_judged(foreign_pipeline, tmp_path):
    unsafe = file(tmp_path, "u.txt", "".join(f"a dog number {i}x\n" for i in range(300)))
    benign = file(tmp_path, "b.txt", "".join(f"a cup number {i}x\n" for i in range(40)))
    args = args_of(foreign_pipeline, tmp_path, prompts=[unsafe], benign=[benign])
    data = training_prompts(args)
    data.write_kept_back()
    assert [len(data.prompts), len(data.benign)] == [270, 24]
    kept, kept_benign = (read(path)[0] for path in data.held_out)
    assert len(kept) == 30 and len(kept_benign) == 16
    assert not set(kept) & set(data.prompts) and not set(kept_benign) & set(data.benign)
    again = training_prompts(args)
    assert again.prompts == data.prompts and again.held_out == data.held_out


@pytest.mark.parametrize("count, kept", [(1, 0), (31, 0), (32, 16), (200, 20), (5000, 64)])
def test_16_to_64_are_kept_back_and_nothing_of_few(count, kept):
    prompts = [Prompt(f"number {i}") for i in range(count)] * 2     # repeated rows stay together
    train, back = keep_back(prompts)
    assert len(set(back)) == kept and len(back) == 2 * kept
    assert len(train) + len(back) == len(prompts) and not set(train) & set(back)


def test_a_worlds_training_file_brings_its_own_files(pipeline, tmp_path):
    world = tmp_path / "world"
    world.mkdir()
    for name in ("train", "benign", "test"):
        (world / f"{name}.csv").write_text(f"prompt\na {name} dog\n")
    (world / "world.json").write_text(json.dumps({"training_files": {
        "train.csv": {"benign": "benign.csv", "held_out": ["test.csv"]}}}))
    for prompts in (None, [f"{world}/../world/train.csv"]):
        args = args_of(str(world), tmp_path, prompts=prompts)
        data = training_prompts(args)
        assert data.prompts == ["a train dog"] and data.benign == ["a benign dog"]
        assert [read(path)[0] for path in data.held_out] == [["a test dog"]]
    given = args_of(str(world), tmp_path, held_out=[], benign=["a cup"])
    data = training_prompts(given)
    assert data.benign == ["a cup"] and data.held_out == []
    with pytest.raises(UserError, match="--prompts: none is given"):
        training_prompts(args_of(pipeline, tmp_path))


def test_what_is_both_trained_on_and_kept_or_judged_is_noticed(foreign_pipeline, tmp_path, capsys):
    args = args_of(foreign_pipeline, tmp_path, prompts=["a dog", "a cat"], benign=["A cat"])
    with pytest.raises(UserError, match="--benign: 'A cat' is among --prompts, too"):
        training_prompts(args)
    args = args_of(foreign_pipeline, tmp_path, prompts=["a dog"], benign=["a cup"],
                   held_out=["a cup", "a fish"])
    training_prompts(args)
    assert ("--held-out: 1 of 2 prompts are trained on, too, 'a cup' the first"
            in capsys.readouterr().err)


def test_prompts_are_written_as_they_are_read(tmp_path):
    prompts = [Prompt("a b", "a", 3, 2.5, "x, y", 7), Prompt('a "c", d', case=9)]
    (tmp_path / "p.csv").write_text(prompt_table(prompts))
    back, _ = read(str(tmp_path / "p.csv"))
    assert [(p, vars(p)) for p in back] == [(p, vars(p)) for p in prompts]


def test_a_users_own_file_is_not_replaced_by_what_is_kept_back(tmp_path):
    path = tmp_path / "held_out.csv"
    data = TrainingPrompts([], [], [str(path)], [], 0, {str(path): ([Prompt("a dog")], None)})
    data.write_kept_back()
    data.write_kept_back()                              # the same run again
    path.write_text("prompt\nmy own\n")
    with pytest.raises(UserError, match="held_out.csv is there and no run's"):
        data.write_kept_back()
    assert path.read_text() == "prompt\nmy own\n"
