"""plumbing/user_reward.py: what a reward of one's own may give, and what is refused."""
import os
import sys

import numpy as np
import pytest
import torch

from plumbing.options import UserError
from plumbing.user_reward import load_reward, score


def test_a_reward_of_ones_own_is_loaded_from_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def redness(pictures, prompts):\n"
                    "    return {'reward': pictures[..., 0].mean((1, 2))}\n")
    reward = load_reward(f"{path}:redness")
    assert reward(np.ones((2, 4, 4, 3)), ["", ""])["reward"].tolist() == [1, 1]
    for wrong in (f"{path}:blueness", str(path), "nowhere.py:f", "mine.txt:f"):
        with pytest.raises(UserError, match="--reward"):
            load_reward(wrong)


def giving(scores):
    """A reward that gives these, whatever the pictures."""
    return lambda pictures, prompts: scores


@pytest.mark.parametrize("given", [
    {"reward": [1., 2.]}, {"reward": 1.}, {"clip": [1.] * 3}, [1.] * 3,
    {"reward": [1.] * 3, "mean": .5}, {"reward": ["a", "b", "c"]}, None])
def test_a_reward_of_another_shape_is_refused(given):
    with pytest.raises(UserError, match="--reward: mine must return .*number per picture .3."):
        score(giving(given), None, ["a", "b", "c"], "mine")


def test_a_reward_that_is_not_a_number_is_refused_and_names_its_prompt():
    with pytest.raises(UserError, match="the reward of 'b' is nan"):
        score(giving({"reward": [1., float("nan")]}), None, ["a", "b"], "mine")


def test_a_reward_may_be_a_list_an_array_or_a_tensor():
    for fine in ([1.] * 3, np.ones((3, 1)), torch.ones(3, requires_grad=True),
                 torch.ones(3).bfloat16()):
        got = score(giving({"reward": fine}), None, ["a", "b", "c"])["reward"]
        assert got.dtype == np.float32 and got.tolist() == [1.] * 3


@pytest.mark.parametrize("value", [float("inf"), 1e30, -1e16])
def test_a_reward_too_large_for_a_sum_of_squares_is_refused(value):
    with pytest.raises(UserError, match="the reward of 'a' is .*a number from -1e.15 to 1e.15"):
        score(giving({"reward": [value, 0.]}), None, ["a", "b"], "mine")


@pytest.mark.parametrize("part", ["loss", "epoch", "grad_norm", "watched_unsafe"])
def test_a_part_named_like_a_column_of_ours_is_refused(part):
    with pytest.raises(UserError, match=f"mine has a part named '{part}'"):
        score(giving({"reward": [1.], part: [1.]}), None, ["a"], "mine")


def test_a_reward_that_fails_is_named_with_its_line():
    def mine(pictures, prompts):
        return {}["nothing"]
    with pytest.raises(UserError, match=r"mine failed in .*reward.py, line \d+ \(KeyError"):
        score(mine, None, ["a"], "mine")


def test_a_reward_may_use_one_buffer_again_and_again():
    buffer = np.zeros(2, np.float32)

    def mine(pictures, prompts):
        buffer[:] += 1
        return {"reward": buffer}
    first = score(mine, None, ["a", "b"], "mine")["reward"]
    score(mine, None, ["a", "b"], "mine")
    assert first.tolist() == [1, 1]


def test_a_reward_that_exits_does_not_end_the_run_in_silence():
    def mine(pictures, prompts):
        sys.exit(0)
    with pytest.raises(UserError, match="mine failed in .*SystemExit: 0"):
        score(mine, None, ["a"], "mine")


def test_what_a_reward_changes_of_ours_is_put_back(tmp_path):
    def mine(pictures, prompts):
        os.chdir(tmp_path)
        torch.set_grad_enabled(False)
        return {"reward": [1.]}
    here = os.getcwd()
    score(mine, None, ["a"], "mine")
    assert os.getcwd() == here and torch.is_grad_enabled()


def test_complex_rewards_are_refused_and_out_of_memory_is_not_the_rewards_fault():
    with pytest.raises(UserError, match="complex numbers"):
        score(giving({"reward": np.ones(1, complex)}), None, ["a"], "mine")

    def mine(pictures, prompts):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        score(mine, None, ["a"], "mine")


FUTURE = """
from __future__ import annotations
from dataclasses import dataclass
import os, torch
torch.set_grad_enabled(False)
torch.set_default_dtype(torch.float64)
os.chdir("/")

@dataclass
class Weights:
    dark: float = 1.

def mine(pictures, prompts):
    return {"reward": [Weights().dark]}
"""


def test_what_a_rewards_file_changes_of_ours_while_it_is_imported_is_put_back(tmp_path):
    (tmp_path / "mine.py").write_text(FUTURE)
    here = os.getcwd()
    mine = load_reward(f"{tmp_path}/mine.py:mine")
    assert os.getcwd() == here and torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert score(mine, None, ["a"], "mine")["reward"].tolist() == [1.]
