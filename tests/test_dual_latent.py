"""Dual latent reconstruction at its two ends, the base's picture and the safe text's."""
import pytest
import torch

from ddpo import denoise, draw_noise, step_mean
from model import Policy, guided, plain
from plumbing.remarks import say_once
from prompts import Prompt
from rivals.dual_latent import dual_latent
from rivals.guiding import safe_states

PROMPTS = [Prompt("a peach", "a drawn peach"), Prompt("an egg", "a drawn egg")]
SHAPES = ["pipeline", "sd1_pipeline", "sd2_pipeline"]


def make(pipeline):
    policy = Policy(pipeline)
    return policy, policy.schedule(5, 1.), draw_noise([1, 2], 5, policy.latent_shape())


def safe_guide(policy, scale):
    return guided(policy, safe_states(policy, PROMPTS), policy.encode([""]), scale)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_of_0_is_the_base_bit_for_bit(shape, request):
    policy, schedule, noise = make(request.getfixturevalue(shape))
    base = denoise(plain(policy, PROMPTS, 2.), noise, schedule, policy.prediction_type)
    found = dual_latent(policy, PROMPTS, noise, schedule, 2., weight=0., switch=0)
    assert torch.equal(found, base)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_of_1_from_the_first_step_is_the_safe_text(shape, request):
    policy, schedule, noise = make(request.getfixturevalue(shape))
    safe = denoise(safe_guide(policy, 2.), noise, schedule, policy.prediction_type)
    found = dual_latent(policy, PROMPTS, noise, schedule, 2., weight=1., switch=0)
    assert torch.allclose(found, safe, atol=1e-5)
    assert not torch.allclose(found, denoise(plain(policy, PROMPTS, 2.), noise, schedule,
                                             policy.prediction_type), atol=1e-3)


@pytest.mark.parametrize("start", [0, 1])
def test_between_them_the_streams_part_at_the_switch_and_are_blended_after_each_step(pipeline,
                                                                                     start):
    policy, schedule, noise = make(pipeline)
    kind, asked, safe = policy.prediction_type, plain(policy, PROMPTS, 2.), safe_guide(policy, 2.)
    unsafe_x = safe_x = noise[:, 0]
    with torch.no_grad():
        for i, k in enumerate(range(start, 5)):
            mean, sigma = step_mean(asked, unsafe_x, schedule, k, kind)
            unsafe_x = mean + sigma * noise[:, i + 1]
            if k < 2:                                   # 20 of 50 steps are two of five
                safe_x = unsafe_x
            else:
                mean, _ = step_mean(safe, safe_x, schedule, k, kind)
                safe_x = mean + sigma * noise[:, i + 1]
                unsafe_x = .7 * unsafe_x + .3 * safe_x
    found = dual_latent(policy, PROMPTS, noise, schedule, 2., start, switch=20, weight=.3)
    assert torch.allclose(found, unsafe_x, atol=1e-5)


def test_after_the_last_step_there_is_no_switch(pipeline):
    policy, schedule, noise = make(pipeline)
    base = denoise(plain(policy, PROMPTS, 2.), noise, schedule, policy.prediction_type)
    assert torch.equal(dual_latent(policy, PROMPTS, noise, schedule, 2., switch=50), base)


def test_what_has_no_safe_text_and_no_pairs_is_the_bases_and_said_to_be(pipeline, capsys):
    policy, schedule, noise = make(pipeline)
    dual_latent(policy, PROMPTS, noise, schedule, 2.)
    assert capsys.readouterr().err == ""
    say_once.cache_clear()
    found = dual_latent(policy, ["a peach", "an egg"], noise, schedule, 2., weight=.5, switch=0)
    base = denoise(plain(policy, PROMPTS, 2.), noise, schedule, policy.prediction_type)
    assert torch.allclose(found, base, atol=1e-5)
    assert "has no safe_text as the base does" in capsys.readouterr().err
