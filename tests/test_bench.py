"""bench.py: what an epoch is said to cost is what it does."""
import json

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
from bench import Epoch, matrix_rate, redness
from checkpoint import save_checkpoint
from train import parse_args


def epoch(pipeline, *options):
    return Epoch(parse_args(["--model", pipeline, "--prompts", "a dog", "--benign", "a cup", "--steps", "4", "--groups", "2", "--group-size", "2",
                             "--batch-size", "2", "--updates", "1", "--benign-share", ".5", "--timestep-fraction", ".5", "--device", "cpu",
                             "--dtype", "fp32", "--rank", "2", "--lora-targets", "attention", *options]), redness)


@pytest.mark.parametrize("keep", ["nothing", "graphs", "gradients"])
def test_the_flops_of_an_epoch_are_those_that_it_does(pipeline, keep):
    """Against the UNet's part of what a counter sees in a whole epoch."""
    timed = epoch(pipeline, "--keep", keep)
    with FlopCounterMode(display=False) as counter:
        told = timed.run()
    assert set(told) == {"sample", "decode", "score", "update"} and all(seconds > 0 for seconds in told.values())
    unet = sum(counter.get_flop_counts()["UNet2DConditionModel"].values())
    assert sum(timed.flops().values()) == pytest.approx(unet, rel=.02)


def test_the_matrix_rate_is_that_of_a_machine():
    assert 1e9 < matrix_rate("cpu", "fp32") < 1e14


@pytest.mark.parametrize("most_unsafe, said", [(.05, "target reached after 6 epochs"), (-1, "target not reached in 9 epochs")])
def test_the_target_is_reached_by_the_first_checkpoint_that_keeps_both_marks(pipeline, tmp_path, monkeypatch, most_unsafe, said):
    """A run of three checkpoints: its second draws what the base does, the others something else, which this CLIP likes less."""
    def likeness(self, pictures, texts):                # to the first picture of a text
        self.first = getattr(self, "first", {})
        return np.array([(self.first.setdefault(text, picture) == picture).mean() for text, picture in zip(texts, pictures)])
    monkeypatch.setattr("reward.ClipScore.__call__", likeness)
    monkeypatch.setattr(bench, "PICTURES", 4)
    monkeypatch.setattr(bench, "MOST_UNSAFE", most_unsafe)
    monkeypatch.setattr(bench, "CLIP_KEPT", .999)
    args = parse_args(["--model", pipeline, "--groups", "2", "--group-size", "2", "--batch-size", "2", "--device", "cpu", "--dtype", "fp32"])
    (tmp_path / "args.json").write_text(json.dumps(vars(args)))
    weights = Epoch(parse_args(["--model", pipeline, "--groups", "2", "--group-size", "2", "--batch-size", "2", "--dtype", "fp32"])).trained
    for number, size in ((3, 1.), (6, 0.), (9, 1.)):
        moved = {name: torch.randn(p.shape, generator=torch.Generator().manual_seed(number)) * size for name, p in weights.items()}
        save_checkpoint(str(tmp_path / "checkpoints"), {"epoch": number, "weights": moved}, 99)
    lines = bench.time_to_target(str(tmp_path), 1)
    seconds = float(lines[0].split(": ")[1].split(" s")[0])
    assert "base 0.0% unsafe" in lines[0] and said in lines[-1]
    epochs, spent = int(lines[-1].split(" epochs")[0].split()[-1]), float(lines[-1].split(", ")[1].split(" s")[0])
    assert spent == pytest.approx(epochs * seconds, abs=epochs * .006 + .51)
