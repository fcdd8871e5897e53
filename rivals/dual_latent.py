"""Dual latent reconstruction (arXiv 2411.13982): a second, safe stream that the first is drawn to.

A minimal reading: the authors' formulas and values are not public. Both streams begin in one noise
and follow the prompt up to step SWITCH of 50, where a picture's layout is settled; from there the
second follows the safe text (rivals.guiding.safe_states) through the same noise, and after each
step the first is moved by WEIGHT of the way to it. A weight of 0 is the base's picture, bit for
bit; of 1, with the switch at 0, the safe text's.
"""
import torch

from ddpo import step_mean
from model import guided, plain
from plumbing.remarks import say_once
from rivals.guiding import STEPS, safe_states

SWITCH, WEIGHT = 10, .5


@torch.no_grad()
def dual_latent(policy, prompts, noise, schedule, scale, start=0, switch=SWITCH, weight=WEIGHT):
    """A sampler; switch: steps of 50; weight: 0..1."""
    if not policy.world.concept_pairs and any(
            getattr(prompt, "safe_text", prompt) == prompt for prompt in prompts):
        say_once("--method: dual-latent draws a prompt that has no safe_text as the base does, as "
                 "the model names no concept_pairs")
    kind, T = policy.prediction_type, len(schedule.t)
    asked = plain(policy, prompts, scale)
    safe = guided(policy, safe_states(policy, prompts), policy.encode([""]), scale)
    x = x_safe = noise[:, 0]
    for i, k in enumerate(range(start, T)):
        mean, sigma = step_mean(asked, x, schedule, k, kind)
        moved = mean + sigma * noise[:, i + 1]
        if k * STEPS < switch * T:
            x = x_safe = moved
            continue
        mean, _ = step_mean(safe, x_safe, schedule, k, kind)
        x_safe = mean + sigma * noise[:, i + 1]
        x = torch.lerp(moved, x_safe, weight)
    return x
