"""SC-Pro's sphere, its votes, and what it asks for."""
import math

import numpy as np
import pytest
import torch

import rivals.sc_pro
from ddpo import draw_noise
from model import Policy
from rivals.sc_pro import PROBES, on_the_sphere, sc_pro

PROMPTS = ["a peach", "an egg"]


def test_probes_lie_at_the_angle_and_are_as_long():
    z = draw_noise([1, 2], 0, (4, 8, 8))[:, 0]
    for radius in (.1, .314, 1.5):
        probe = on_the_sphere(z, 0, radius)
        assert torch.allclose(probe.flatten(1).norm(dim=1), z.flatten(1).norm(dim=1), rtol=1e-4)
        cosine = torch.cosine_similarity(probe.flatten(1), z.flatten(1))
        assert torch.allclose(cosine.acos(), torch.full((2,), radius), atol=1e-3)


def test_a_probe_is_its_noises_own_in_any_company_and_another_each_turn():
    z = draw_noise([1, 2], 0, (4, 8, 8))[:, 0]
    both = on_the_sphere(z, 3, .3)
    assert torch.equal(both[1], on_the_sphere(z[1:], 3, .3)[0])
    assert not torch.allclose(both, on_the_sphere(z, 4, .3), atol=1e-2)


class Eye:
    """A detector that sees what a picture's first number says."""

    def __init__(self, device=None):
        pass

    def __call__(self, pictures):
        scores = np.zeros((len(pictures), 18), np.float32)
        scores[:, 3] = pictures[:, 0, 0, 0] / 100
        return scores


@pytest.mark.parametrize("tripping, itself, blocked", [
    (0, 0, False), (3, 0, False), (4, 0, True), (8, 0, True), (0, 90, True)])
def test_half_of_the_probes_or_the_picture_itself_blocks(pipeline, monkeypatch, tripping, itself,
                                                         blocked):
    monkeypatch.setattr(rivals.sc_pro, "Nudity", Eye)
    policy, turns = Policy(pipeline), []

    def draw(prompts, noise):
        turns.append(noise)
        shown = np.zeros((len(prompts), 4, 4, 3), np.uint8)
        shown[0] = 90 * (len(turns) <= tripping)        # of the first prompt alone
        return shown
    pictures = np.zeros((2, 4, 4, 3), np.uint8)
    pictures[0] = itself
    noise = draw_noise([1, 2], 4, policy.latent_shape())
    kept = noise.clone()
    found = sc_pro(policy, PROMPTS, noise, draw, pictures)
    assert found.tolist() == [blocked, False]
    assert len(turns) == PROBES and torch.equal(noise, kept)
    for around in turns:                                # the first noise alone is another
        assert torch.equal(around[:, 1:], noise[:, 1:])
        angle = torch.cosine_similarity(around[:, 0].flatten(1), noise[:, 0].flatten(1)).acos()
        assert torch.allclose(angle, torch.full((2,), .1 * math.pi), atol=1e-3)


def test_before_a_picture_is_drawn_it_blocks_nothing(pipeline):
    assert sc_pro(Policy(pipeline), PROMPTS, None, None, None).tolist() == [False, False]
