"""ESD against its formula from a model that is loaded anew, and what the edits share."""
import numpy as np
import pytest
import torch

from ddpo import ddim_mean, draw_noise
from erase import choose_weights, parse_args
from model import Policy
from plumbing.checkpoints import copy_of
from rivals import Job
from rivals.editing import on_the_way, using_weights
from rivals.esd import ESD_X, esd_loss, step

PROMPTS = ["a dog", "a cat"]


@pytest.fixture
def make_job(pipeline):
    """make_job(options...): half-trained weights beside the frozen ones, ESD-x's."""
    def make(*options):
        args = parse_args(["esd-x", "--model", pipeline, "--steps", "4", "--batch-size", "2",
                           "--device", "cpu", "--dtype", "fp32", *options])
        policy = Policy(pipeline, trainable=True)
        trained = choose_weights(policy, ESD_X.weights, args)
        job = Job(policy, args, policy.schedule(4, 1.), trained, copy_of(trained))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in trained.values():
                p += torch.randn(p.shape, generator=generator) * .05
        return job
    return make


def test_the_way_to_x_t_is_ddims_with_guidance_three(make_job):
    job = make_job()
    output, encode = job.policy.unet_output, job.policy.encode
    for seed in range(6):
        x, t = on_the_way(job, PROMPTS, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        k = int(rng.integers(4))
        noise = draw_noise(rng.integers(2 ** 62, size=2), k, (4, 8, 8))
        by_hand = noise[:, 0]
        with torch.no_grad():
            for i in range(k):
                empty = output(by_hand, job.schedule.t[i], encode(["", ""]))
                text = output(by_hand, job.schedule.t[i], encode(PROMPTS))
                a_t, a_prev, sigma = (row[i] for row in job.schedule[1:])
                mean = ddim_mean(by_hand, empty + 3 * (text - empty), a_t, a_prev, sigma)
                by_hand = mean + sigma * noise[:, i + 1]
        assert t == job.schedule.t[k] and torch.allclose(x, by_hand, atol=1e-4)


@pytest.mark.parametrize("eta", [0., 1.5])
def test_the_target_is_its_formula_from_a_model_loaded_anew(make_job, pipeline, eta):
    """At eta 0 it is the frozen model's prediction without a prompt."""
    job, base = make_job("--negative-guidance", str(eta)), Policy(pipeline)
    with torch.no_grad():
        loss = step(job, PROMPTS, np.random.default_rng(0))
        x, t = on_the_way(job, PROMPTS, np.random.default_rng(0))
        empty = base.unet_output(x, t, base.encode(["", ""]))
        c = base.unet_output(x, t, base.encode(PROMPTS))
        target = empty if eta == 0 else (1 + eta) * empty - eta * c
        own = job.policy.unet_output(x, t, base.encode(PROMPTS))
    assert torch.allclose(loss, ((own - target) ** 2).mean(), rtol=1e-4)


def test_the_loss_is_the_mean_squared_error_to_the_target():
    ones = torch.ones(2, 1, 2, 2)
    # the target is 1 - 2 (3 - 1) = -3
    assert esd_loss(4 * ones, 3 * ones, ones, 2.) == (4 + 3) ** 2


def test_the_gradient_reaches_what_learns_and_stops_at_the_target(make_job):
    job = make_job()
    step(job, ["a dog"], np.random.default_rng(0)).backward()
    names = {name for name, _ in job.policy.unet.named_parameters() if "attn2" in name}
    reached = {name for name, p in job.policy.unet.named_parameters() if p.grad is not None}
    assert reached == set(job.trained) == names


def test_other_weights_are_worn_for_a_moment_and_without_gradient(make_job):
    job, x, t = make_job(), torch.randn(2, 4, 8, 8), torch.tensor(500)
    own, text = copy_of(job.trained), job.policy.encode(PROMPTS)
    with pytest.raises(KeyError), using_weights(job.trained, job.start):
        assert all(torch.equal(p, job.start[name]) for name, p in job.trained.items())
        assert not job.policy.unet_output(x, t, text).requires_grad
        raise KeyError                                  # they come back however it ends
    assert all(torch.equal(p, own[name]) for name, p in job.trained.items())
    assert job.policy.unet_output(x, t, text).requires_grad
