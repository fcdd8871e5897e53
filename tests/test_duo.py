"""DUO's loss against its formula with diffusers' noise, its first step, and its pairs."""
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from safetensors import safe_open

import rivals.duo
from ddpo import step_mean
from erase import choose_weights, main, parse_args
from model import Policy
from plumbing.checkpoints import copy_of
from plumbing.options import UserError
from prompts import Prompt
from reward import STRICT
from rivals import Job
from rivals.duo import DUO, LAST, duo_loss, prepare, step, twin
from rivals.guiding import safe_states
from sample import generate

PROMPTS = [Prompt("a peach", "a drawn peach"), Prompt("an egg", "a drawn egg")]


def make_job(pipeline, *more):
    args = parse_args(["duo", "--model", pipeline, "--prompts", "a dog", "--steps", "4",
                       "--batch-size", "2", "--device", "cpu", "--dtype", "fp32", "--recipe",
                       "embedded", *more])
    torch.manual_seed(0)
    policy = Policy(pipeline, trainable=True)
    trained = choose_weights(policy, DUO.weights, args)
    job = Job(policy, args, policy.schedule(4, 1.), trained, copy_of(trained),
              draw=lambda texts, seeds: generate(policy, texts, seeds, args))
    shape = (5, *policy.latent_shape())
    job.data = tuple(torch.randn(shape, generator=torch.Generator().manual_seed(k))
                     for k in range(2))
    return job


def disturb(trained):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trained.values():
            p += torch.randn(p.shape, generator=generator) * .05


def test_only_self_attention_learns_and_as_a_lora(pipeline):
    trained = make_job(pipeline).trained
    assert trained and all("lora" in name and "attn1" in name for name in trained)


@pytest.mark.parametrize("shape", ["pipeline", "sd1_pipeline", "sd2_pipeline"])
def test_the_first_step_is_log_2_and_the_base_is_its_own_prior(shape, request):
    job = make_job(request.getfixturevalue(shape))
    loss = step(job, PROMPTS, np.random.default_rng(0))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    loss.backward()
    assert any(p.grad.abs().max() > 0 for p in job.trained.values())


@pytest.mark.parametrize("shape", ["sd1_pipeline", "sd2_pipeline"])
def test_the_loss_is_its_formula_with_diffusers_noise(shape, request):
    job = make_job(request.getfixturevalue(shape), "--beta", "31", "--prior-weight", "7")
    disturb(job.trained)
    loss = step(job, PROMPTS, np.random.default_rng(0)).item()

    rng = np.random.default_rng(0)
    scheduler = DDIMScheduler.from_config(job.policy.scheduler.config)
    i, seeds = rng.integers(5, size=2), rng.integers(2 ** 62, size=2)
    t = rng.integers(750, size=4)

    def output(x, time):
        text = job.policy.text_states("")[None]
        with torch.no_grad():
            return job.policy.unet(x, time, text).sample

    def error(z, e, time):
        target = e if scheduler.config.prediction_type == "epsilon" else scheduler.get_velocity(
            z, e, time)
        return ((output(scheduler.add_noise(z, e, time), time) - target) ** 2).mean().item()
    preference, prior = 0, 0
    for row in range(2):
        e = torch.randn(1, *job.data[0].shape[1:],
                        generator=torch.Generator().manual_seed(int(seeds[row])))
        z = job.data[0][i[row]][None], job.data[1][i[row]][None]
        times = torch.tensor([t[row]]), torch.tensor([t[row + 2]])
        now = [error(one, e, time) for one, time in zip(z, times, strict=True)]
        answer = output(e, torch.tensor([999]))
        with job.policy.base():
            before = [error(one, e, time) for one, time in zip(z, times, strict=True)]
            prior += ((answer - output(e, torch.tensor([999]))) ** 2).mean().item() / 2
        D = (now[0] - before[0]) - (now[1] - before[1])
        preference += math.log1p(math.exp(31 * D)) / 2
    if job.policy.prediction_type == "v_prediction":    # e = sqrt(a) v + sqrt(1 - a) x
        prior *= job.policy.scheduler.alphas_cumprod[999].item()
    assert loss == pytest.approx(preference + 7 * 31 * prior, rel=1e-3)


def test_a_safe_picture_that_is_predicted_better_lowers_the_loss():
    zero, less = torch.zeros(1), torch.full((1,), -.01)
    assert duo_loss(less, zero, 31.) < duo_loss(zero, zero, 31.) < duo_loss(zero, less, 31.)


def test_timesteps_are_of_the_first_three_quarters():
    assert int(LAST * 1000) == 750


def test_a_twin_begins_at_the_noised_picture_and_follows_the_safe_text(pipeline):
    job = make_job(pipeline, "--strength", ".5", "--start-guidance", "1")
    z = job.data[1][:2]
    found = twin(job, z, PROMPTS, np.random.default_rng(3))
    policy, schedule = job.policy, job.schedule
    seeds = np.random.default_rng(3).integers(2 ** 62, size=2)
    x = []
    for row, seed in enumerate(seeds):
        noise = torch.randn(3, *z.shape[1:], generator=torch.Generator().manual_seed(int(seed)))
        latent = DDIMScheduler.from_config(policy.scheduler.config).add_noise(
            z[row], noise[0], schedule.t[2])
        x.append((latent, noise[1:]))
    noise = torch.stack([torch.cat([latent[None], later]) for latent, later in x])
    text, by_hand = safe_states(policy, PROMPTS), noise[:, 0]
    with torch.no_grad():
        for i, k in enumerate((2, 3)):
            mean, sigma = step_mean(lambda x, t: policy.unet_output(x, t, text), by_hand, schedule,
                                    k, policy.prediction_type)
            by_hand = mean + sigma * noise[:, i + 1]
    assert torch.allclose(found, by_hand, atol=1e-4)


class Eye:
    """A detector that takes pictures for unsafe in the order that it is told."""
    answers = []

    def __init__(self, device=None):
        pass

    def __call__(self, pictures):
        scores = np.zeros((len(pictures), 18), np.float32)
        scores[:, 3] = self.answers.pop(0)
        return scores


def test_a_pair_is_an_unsafe_picture_and_a_twin_drawn_until_it_is_safe(pipeline, monkeypatch,
                                                                      capsys):
    job = make_job(pipeline, "--pictures", "3")
    monkeypatch.setattr(rivals.duo, "Nudity", Eye)
    monkeypatch.setattr(rivals.duo, "TRIES", 2)
    # three pictures, two of them unsafe; one twin is safe at once, the other never
    Eye.answers = [[.9, 0, .9], [0, .9], [.9]]
    prepare(job, PROMPTS, [], STRICT)
    safe, unsafe = job.data
    assert len(safe) == len(unsafe) == 1 and safe.abs().max() > 0
    assert not torch.equal(safe, unsafe)
    assert "1 of 3 pictures; 1 unsafe ones had no safe twin" in capsys.readouterr().out
    Eye.answers = [[0, 0, 0]]
    with pytest.raises(UserError, match="none of 3 pictures"):
        prepare(job, PROMPTS, [], STRICT)


def test_only_the_labels_that_are_asked_for_make_a_pair(pipeline, monkeypatch):
    job = make_job(pipeline, "--pictures", "2")
    monkeypatch.setattr(rivals.duo, "Nudity", Eye)
    Eye.answers = [[.9, .9]]                            # of FEMALE_BREAST_EXPOSED
    with pytest.raises(UserError, match="none of 2 pictures"):
        prepare(job, PROMPTS, [], ["FACE_FEMALE"])


@pytest.mark.parametrize("shape", ["sd1_pipeline", "sd2_pipeline"])
def test_a_run_ends_in_a_lora_of_self_attention(shape, request, tmp_path, monkeypatch):
    monkeypatch.setattr(rivals.duo, "Nudity", Eye)
    Eye.answers = [[.9, .9], [0, 0]]
    prompts, folder = tmp_path / "p.csv", str(tmp_path / "run")
    prompts.write_text("prompt,safe_text\na peach,a drawn peach\nan egg,a drawn egg\n")
    main(parse_args(["duo", "--model", request.getfixturevalue(shape), "--prompts", str(prompts),
                     "--steps", "2", "--batch-size", "2", "--pictures", "2", "--iterations", "2",
                     "--rank", "4", "--device", "cpu", "--output-dir", folder]))
    with safe_open(f"{folder}/pytorch_lora_weights.safetensors", "pt") as file:
        assert all(".attn1." in name for name in file.keys())
