"""SafeGen's loss against its formula with diffusers' noise, and the pictures it learns from."""
import os
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

import rivals.safegen
from ddpo import draw_noise
from erase import parse_args
from model import Policy
from plumbing.options import UserError
from plumbing.plots import pixelate
from prompts import read
from reward import STRICT
from rivals import Job
from rivals.safegen import MOSAIC, prepare, safegen_loss, step, to_latents
from sample import generate


def options(pipeline, *more):
    return parse_args(["safegen", "--model", pipeline, "--prompts", "a dog", "--steps", "4",
                       "--batch-size", "2", "--device", "cpu", "--dtype", "fp32", *more])


@pytest.fixture
def make_job(pipeline):
    def make(*more):
        args, policy = options(pipeline, *more), Policy(pipeline)
        return Job(policy, args, policy.schedule(4, 1.), {}, {},
                   draw=partial(generate, policy, args=args))
    return make


def test_the_loss_is_its_formula_written_out(make_job):
    job = make_job("--mosaic-weight", ".1")
    nude, mosaic, benign = job.data = [
        torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    rng = np.random.default_rng(0)
    i, j = rng.integers(5, size=2), rng.integers(5, size=2)
    seeds, times = rng.integers(2 ** 62, size=4), rng.integers(1000, size=4)
    scheduler = DDIMScheduler.from_config(job.policy.scheduler.config)
    empty, by_hand = job.policy.encode([""]), 0
    with torch.no_grad():
        loss = step(job, ["unused"] * 2, np.random.default_rng(0))
        for row in range(4):
            e = draw_noise(seeds[row:row + 1], 0, (4, 8, 8))[:, 0]
            t = torch.tensor([times[row]])
            if row < 2:
                z = scheduler.add_noise(nude[i[row]][None], e, t)
                z_m = scheduler.add_noise(mosaic[i[row]][None], e, t)
                target, weight = z - z_m + e, .1
            else:
                z = scheduler.add_noise(benign[j[row - 2]][None], e, t)
                target, weight = e, .9
            error = ((job.policy.unet_output(z, t, empty) - target) ** 2).mean()
            by_hand += weight * error / 2
    assert torch.allclose(loss, by_hand, rtol=1e-4)


def test_the_weight_shares_one_between_mosaics_and_benign():
    zero, one, two = torch.zeros(1), torch.ones(1), torch.full((1,), 2.)
    assert safegen_loss(zero, one, zero, two, .25) == .25 * 1 + .75 * 4


class Half:
    """A detector for which every second picture trips."""

    def __init__(self):
        self.seen = []

    def __call__(self, pictures):
        self.seen.append(pictures)
        scores = np.where(np.arange(len(pictures)) % 2, .9, .1)
        return np.repeat(scores[:, None], 18, axis=1)


def test_its_pictures_are_those_that_trip_their_mosaics_and_benign_ones_that_do_not(
        make_job, tmp_path, monkeypatch):
    detector = Half()
    monkeypatch.setattr(rivals.safegen, "Nudity", lambda: detector)
    monkeypatch.chdir(tmp_path)
    job = make_job("--pictures", "5")
    prompts, benign = read("a dog")[0], read("a cup")[0]
    assert prepare(job, prompts, benign, STRICT) is None            # trains nothing extra
    nude, mosaic, harmless = job.data
    trips, rests = detector.seen[0][1::2], detector.seen[1][::2]
    assert torch.equal(nude, to_latents(job.policy, trips))
    assert torch.equal(harmless, to_latents(job.policy, rests))
    squares = pixelate(trips, [True, True], MOSAIC)
    assert torch.equal(mosaic, to_latents(job.policy, squares)) and not torch.equal(nude, mosaic)
    assert not os.listdir(tmp_path)                                 # in memory alone


def test_without_any_nude_picture_or_benign_prompt_it_says_so(make_job, monkeypatch):
    monkeypatch.setattr(rivals.safegen, "Nudity",
                        lambda: lambda pictures: np.zeros((len(pictures), 18)))
    job, prompts = make_job("--pictures", "3"), read("a dog")[0]
    with pytest.raises(UserError, match="--pictures: of 3 pictures each, 0 of --prompts trip"):
        prepare(job, prompts, prompts, STRICT)
    with pytest.raises(UserError, match="--benign: safegen needs prompts of what has to stay"):
        prepare(job, prompts, [], STRICT)


def test_latents_are_the_way_back_from_decoding(make_job):
    """Half of the encoder's output is a mean, scaled as diffusers' pipelines scale it."""
    job = make_job()
    pictures = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    latents = to_latents(job.policy, pictures)
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        mean = job.policy.vae.encode(x).latent_dist.mean
    wanted = mean * job.policy.vae.config.scaling_factor
    assert latents.shape == (3, 4, 8, 8) and torch.allclose(latents, wanted, atol=1e-5)
