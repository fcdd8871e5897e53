"""A reward of the user's own, --reward my_file.py:my_function: found, called, looked at."""
import importlib.util
import os
import sys
import traceback
from contextlib import contextmanager

import numpy as np
import torch

from plumbing.cards import OWN_COLUMNS
from plumbing.options import UserError, first_line, is_out_of_memory

LARGEST = 1e15                          # of a reward: float32 must hold sums of its squares


@contextmanager
def ours_kept():
    """After it the working directory, torch's gradients and its dtype are as they were."""
    here, has_gradient, dtype = os.getcwd(), torch.is_grad_enabled(), torch.get_default_dtype()
    try:
        yield
    finally:
        os.chdir(here)
        torch.set_grad_enabled(has_gradient)
        torch.set_default_dtype(dtype)


def load_reward(spec):
    """my_file.py:my_function -> that function."""
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py"):
        raise UserError(f"--reward: {spec} is not of the form my_file.py:my_function")
    if not os.path.isfile(path):
        raise UserError(f"--reward: the file {path} does not exist")
    module_spec = importlib.util.spec_from_file_location("their_reward", path)
    module = sys.modules["their_reward"] = importlib.util.module_from_spec(module_spec)
    sys.path.append(os.path.dirname(os.path.abspath(path)))     # its neighbours can be imported
    try:
        with ours_kept():
            module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:            # anything can go wrong in a user's file
        raise UserError(f"--reward: {path} can't be imported "
                        f"({type(error).__name__}: {error})") from None
    if not callable(getattr(module, name, None)):
        raise UserError(f"--reward: {path} has no function {name!r}")
    return getattr(module, name)


def score(reward_fn, pictures, texts, name=None):
    """What a reward gives for pictures (N, H, W, 3) of these prompts, as {part: float32 (N,)}.

    Lists, arrays and tensors will do; they are copied. name: the user's, as --reward has it. Of
    the parts but "reward" train.py knows one: what is not "unsafe" (0), or everything where there
    is no such part, is what --base-weight holds, but for prompts that have a safe_text.
    UserError where it fails, returns no such dict with "reward", names a part as metrics.jsonl
    names a column of its own, or where a reward is not a number that can be squared.
    """
    try:
        with ours_kept():
            scores = reward_fn(pictures, texts)
    except (Exception, SystemExit) as error:
        if name is None or isinstance(error, UserError) or is_out_of_memory(error):
            raise                                       # ours; a user's may fail in any way
        line = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(f"--reward: {name} failed in {line.filename}, line {line.lineno} "
                        f"({type(error).__name__}: {first_line(error)})") from None
    try:
        parts = {str(part): as_numbers(values) for part, values in scores.items()}
        got = {part: len(values) for part, values in parts.items()}
    except (AttributeError, TypeError, ValueError) as error:
        parts, got = {}, f"{type(scores).__name__} ({error})"
    if "reward" not in parts or {len(values) for values in parts.values()} != {len(texts)}:
        raise UserError(f"--reward: {name} must return a dict with 'reward', each part one number "
                        f"per picture ({len(texts)}); got {got}")
    for part in parts:
        if part in OWN_COLUMNS or part.startswith("watched_"):
            raise UserError(f"--reward: {name} has a part named {part!r}, which is a column of "
                            "metrics.jsonl already; rename it")
    reward = parts["reward"]
    bad = np.flatnonzero(~(np.abs(reward) <= LARGEST))  # not a number, too
    if len(bad):
        option = "--reward" if name else "--clip-weight"
        raise UserError(f"{option}: the reward of {str(texts[bad[0]])!r} is {reward[bad[0]]}; a "
                        f"number from {-LARGEST:g} to {LARGEST:g} is needed; nothing was learned "
                        "from this epoch, the last checkpoint stays")
    return parts


def as_numbers(values):
    """A reward's part as a float32 array (N,) of its own. TypeError or ValueError if it is none."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values   # numpy has no bfloat16
    values = np.asarray(values)
    if np.iscomplexobj(values):
        raise TypeError("complex numbers")
    return np.array(values, np.float32).reshape(-1)
