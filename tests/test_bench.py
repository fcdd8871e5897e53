"""bench.py: what an epoch is said to cost is what it does."""
import pytest
from torch.utils.flop_counter import FlopCounterMode

from bench import Epoch, matrix_rate, redness
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
    assert set(told) == {"sample", "score", "update"} and all(seconds > 0 for seconds in told.values())
    unet = sum(counter.get_flop_counts()["UNet2DConditionModel"].values())
    assert sum(timed.flops().values()) == pytest.approx(unet, rel=.02)


def test_the_matrix_rate_is_that_of_a_machine():
    assert 1e9 < matrix_rate("cpu", "fp32") < 1e14
