"""judging/verdict.py: what a training ends with."""
import json
from argparse import Namespace

import pytest
import torch

from judging import verdict
from judging.compare import compare
from judging.judges import load_tools
from judging.report import rounded
from judging.rows import System, draw_row, open_file
from judging.verdict import judge_run
from model import Policy
from reward import STRICT


@pytest.fixture
def held_out(tmp_path):
    """Three files: all benign, one with a category, one without."""
    texts = {
        "benign.csv": "prompt,category\na dog,benign\na cat,benign\n",
        "mixed.csv": "prompt,category\na peach,sexual\na car,other\na large egg,sexual\n",
        "plain.csv": "prompt\nan egg\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    return [str(tmp_path / name) for name in texts]


def test_the_verdict_is_the_comparison_of_the_base_and_the_trained_policy(
        pipeline, held_out, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verdict, "VERDICT_PICTURES", 4)
    args = Namespace(model=pipeline, category="sexual", steps=2, guidance=2., batch_size=3,
                     output_dir=str(tmp_path / "run"))
    policy = Policy(pipeline, trainable=True)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in policy.make_trainable("lora").values():
            p.normal_(0, .2)
    judges = load_tools(policy.world, policy.device)
    judge_run(policy, judges, held_out, STRICT, args, "card: {}".format)

    headline = capsys.readouterr().out.strip()
    assert "| mixed.csv (unsafe; 4 pictures, 2 prompts) | before | after |" in headline
    assert "| benign.csv (benign; 4 pictures, 2 prompts) |" in headline
    assert "| plain.csv (unsafe; 4 pictures, 1 prompts) |" in headline
    assert (tmp_path / "run" / "README.md").read_text() == f"card: {headline}"
    table = json.loads((tmp_path / "run" / "verdict.json").read_text())

    # the same by the parts of an evaluation
    settings = Namespace(**vars(args), eta=1., resolution=None)
    files = {name: open_file(path, pictures=4, category=category)
             for name, path, category in zip(table, held_out, (None, "sexual", None), strict=True)}
    rows, store = [], {}
    for name, drawn in {"before": Policy(pipeline), "after": policy}.items():
        rows.append(draw_row(System(name=name), drawn, files, store, settings, drawn.decode))
    by_hand, _ = compare(files, rows, load_tools(policy.world, "cpu"), store, STRICT)
    assert table == rounded(by_hand)
    assert table["plain.csv"]["after"]["clip_distance"]["value"] > 0


def test_the_verdict_is_written_before_it_is_printed_and_names_what_shows_nothing(
        pipeline, held_out, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verdict, "VERDICT_PICTURES", 2)
    args = Namespace(model=pipeline, category=None, steps=2, guidance=2., batch_size=3,
                     output_dir=str(tmp_path / "run"))
    policy = Policy(pipeline, trainable=True)
    policy.make_trainable("lora")                       # else its latents are the base's
    judges = load_tools(policy.world, policy.device)

    def broken(*words, file=None):
        if file is None:
            raise BrokenPipeError
    monkeypatch.setattr(verdict, "print", broken, raising=False)
    with pytest.raises(BrokenPipeError):
        judge_run(policy, judges, held_out[2:], STRICT, args, "card: {}".format)
    assert (tmp_path / "run" / "verdict.json").exists()
    assert (tmp_path / "run" / "README.md").exists()

    monkeypatch.undo()
    monkeypatch.setattr(verdict, "VERDICT_PICTURES", 2)
    monkeypatch.setattr(policy, "unet_output", lambda x, t, text: x / 0)
    judge_run(policy, judges, held_out[2:], STRICT, args, "card: {}".format)
    said = capsys.readouterr()
    assert "after, plain.csv: 2 of 2 pictures show nothing" in said.err
    assert "| no picture: flat, or not finite |" in said.out
