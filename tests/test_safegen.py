"""SafeGen's loss against its formula with diffusers' noise, and the pictures it learns from."""
import os
from functools import partial

import numpy as np
import pytest
import torch
from conftest import build_random_pipeline
from diffusers import DDIMScheduler

import rivals.safegen
from erase import parse_args
from model import Policy
from plumbing.options import UserError
from plumbing.plots import pixelate
from prompts import read
from reward import STRICT
from rivals import Job
from rivals.editing import to_latents
from rivals.safegen import MOSAIC, prepare, safegen_loss, step
from sample import generate


def options(pipeline, *more):
    return parse_args(["safegen", "--model", pipeline, "--prompts", "a dog", "--steps", "4",
                       "--batch-size", "2", "--device", "cpu", "--dtype", "fp32", *more])


@pytest.fixture(scope="module")
def v_pipeline(tmp_path_factory):
    return build_random_pipeline(tmp_path_factory.mktemp("v"), "v_prediction", {})


@pytest.fixture
def make_job(pipeline):
    def make(*more, pipeline=pipeline):
        args, policy = options(pipeline, *more), Policy(pipeline)
        return Job(policy, args, policy.schedule(4, 1.), {}, {},
                   draw=partial(generate, policy, args=args))
    return make


class At:
    """A random generator that draws one timestep, t, and keeps how many it had to choose from."""

    def __init__(self, t):
        self.t, self.rng, self.choices = t, np.random.default_rng(0), None

    def integers(self, high, size):
        drawn = self.rng.integers(high, size=size)
        if 100 < high <= 1000:                          # not a picture's place, not a seed
            self.choices, drawn = high, np.full(size, self.t)
        return drawn


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("t", [1, 500, 999])
def test_the_loss_is_its_formula_written_out(make_job, pipeline, v_pipeline, kind, t):
    """w MSE(e(x_n), z_n - z_m + e) + (1 - w) MSE(e(x_b), e_b), of clean latents, one e for both."""
    job = make_job("--mosaic-weight", ".1",
                   pipeline=pipeline if kind == "epsilon" else v_pipeline)
    nude, mosaic, benign = job.data = [
        torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    rng = np.random.default_rng(0)
    i, j = rng.integers(5, size=2), rng.integers(5, size=2)
    seeds = rng.integers(2 ** 62, size=4)
    scheduler = DDIMScheduler.from_config(job.policy.scheduler.config)
    a, time, by_hand = scheduler.alphas_cumprod[t], torch.tensor([t]), 0
    empty = job.policy.text_encoder(job.policy.tokenizer(
        [""], padding="max_length", max_length=24, return_tensors="pt").input_ids)[0]
    with torch.no_grad():
        loss = step(job, ["unused"] * 2, At(t))
        for row in range(4):
            e = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(int(seeds[row])))
            z = (nude[i[row]] if row < 2 else benign[j[row - 2]])[None]
            x = scheduler.add_noise(z, e, time)
            target, weight = (z - mosaic[i[row]] + e, .1) if row < 2 else (e, .9)
            if kind == "v_prediction":                  # the v at x that stands for that noise
                target = (target - (1 - a).sqrt() * x) / a.sqrt()
                if row >= 2:
                    assert torch.allclose(target, scheduler.get_velocity(z, e, time), atol=1e-4)
            error = ((job.policy.unet(x, t, empty).sample - target) ** 2).mean()
            by_hand += weight * error / 2
    assert torch.allclose(loss, by_hand, rtol=1e-3)


def test_the_wanted_shift_is_as_large_in_the_noise_as_in_the_picture(make_job, monkeypatch):
    """At t 999 next to nothing of the pictures is left in x; their difference is in the target."""
    job, targets = make_job(), []
    monkeypatch.setattr(rivals.safegen, "safegen_loss",
                        lambda *given: targets.append(given[1]) or given[0].sum())
    zero = torch.zeros(1, 4, 8, 8)
    for nude in (zero, zero + 3):
        job.data = nude, zero, zero
        with torch.no_grad():
            step(job, ["unused"] * 2, At(999))
    assert torch.allclose(targets[1] - targets[0], zero + 3, atol=1e-5)


def test_a_v_network_is_not_asked_where_no_signal_is_left(make_job, v_pipeline):
    """A zero-terminal-SNR schedule: alpha-bar 0 at t 999, where epsilon's target has no v."""
    job = make_job(pipeline=v_pipeline)
    job.data = [torch.randn(5, 4, 8, 8) for _ in range(3)]
    usual = At(0)
    step(job, ["unused"] * 2, usual)
    assert usual.choices == 1000                        # Stable Diffusion's schedule is used whole
    job.policy.scheduler = DDIMScheduler.from_config(job.policy.scheduler.config,
                                                     rescale_betas_zero_snr=True)
    a, rescaled = job.policy.scheduler.alphas_cumprod, At(0)
    step(job, ["unused"] * 2, rescaled)
    assert 850 < rescaled.choices < 1000
    assert a[rescaled.choices - 1] >= .004 > a[rescaled.choices] and a[999] == 0
    assert torch.isfinite(step(job, ["unused"] * 2, At(rescaled.choices - 1)))


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
    monkeypatch.setattr(rivals.safegen, "Nudity", lambda device: detector)
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
                        lambda device: lambda pictures: np.zeros((len(pictures), 18)))
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
