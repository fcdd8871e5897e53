"""EraseFlow's balance against its formula and torch.distributions, and what it trains."""
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributions import Normal

from ddpo import draw_noise, log_prob, rollout, step_mean
from erase import choose_weights, main, parse_args
from model import Policy, guided, plain
from plumbing.checkpoints import copy_of
from plumbing.options import UserError
from prompts import Prompt
from rivals import Job
from rivals.eraseflow import ERASEFLOW, LOG_Z, eraseflow_loss, log_backward, prepare, step
from rivals.guiding import safe_states

PROMPTS = [Prompt("a peach", "a drawn peach"), Prompt("an egg", "a drawn egg")]


def make_job(pipeline, *more):
    args = parse_args(["eraseflow", "--model", pipeline, "--prompts", "a dog", "--steps", "5",
                       "--batch-size", "2", "--device", "cpu", "--dtype", "fp32", *more])
    torch.manual_seed(0)
    policy = Policy(pipeline, trainable=True)
    trained = choose_weights(policy, ERASEFLOW.weights, args)
    job = Job(policy, args, policy.schedule(5, 1.), trained, copy_of(trained))
    for name, tensor in prepare(job, PROMPTS, [], []).items():
        job.trained[name] = tensor.requires_grad_()
    return job


def test_the_noising_of_a_step_is_a_normal_density():
    generator = torch.Generator().manual_seed(0)
    x, x_prev = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))
    a_t, a_prev = torch.tensor([.1, .5, .9]), torch.tensor([.3, .6, .95])
    ratio = (a_t / a_prev).view(-1, 1, 1, 1)
    by_torch = Normal(ratio.sqrt() * x_prev, (1 - ratio).sqrt()).log_prob(x).mean((1, 2, 3))
    assert torch.allclose(log_backward(x, x_prev, a_t, a_prev), by_torch, atol=1e-5)


@pytest.mark.parametrize("shape", ["sd1_pipeline", "sd2_pipeline"])
def test_the_loss_is_the_balance_of_the_anchors_trajectory_under_the_target(shape, request):
    job = make_job(request.getfixturevalue(shape), "--guidance", "3", "--log-beta", "4")
    policy, schedule = job.policy, job.schedule
    with torch.no_grad():
        for p in job.trained.values():
            p += torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * .05
        loss = step(job, PROMPTS, np.random.default_rng(0)).item()
        rng = np.random.default_rng(0)
        noise = draw_noise(rng.integers(2 ** 62, size=2), 5, policy.latent_shape())
        early = rng.permutation(4)[0]
        anchor = guided(policy, safe_states(policy, PROMPTS), policy.encode([""]), 3.)
        path, _ = rollout(anchor, noise, schedule, policy.prediction_type)
        by_hand = []
        for row, prompt in enumerate(PROMPTS):
            total = job.trained["log_z"] - 4
            for k in (early, 4):
                x, x_prev = path[row:row + 1, k], path[row:row + 1, k + 1]
                mean, sigma = step_mean(plain(policy, [prompt], 3.), x, schedule, int(k),
                                        policy.prediction_type)
                a = schedule.a_t[k] / schedule.a_prev[k]
                total = total + log_prob(x_prev, mean, sigma) - Normal(
                    a.sqrt() * x_prev, (1 - a).sqrt()).log_prob(x).mean()
            by_hand.append(total ** 2)
    assert loss == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-3)


def test_under_its_own_prompt_log_p_f_is_what_the_rollout_says(pipeline):
    policy = Policy(pipeline)
    schedule, noise = policy.schedule(5, 1.), draw_noise([1, 2], 5, policy.latent_shape())
    path, log_probs = rollout(plain(policy, PROMPTS, 2.), noise, schedule, policy.prediction_type)
    for k in range(5):
        with torch.no_grad():
            mean, sigma = step_mean(plain(policy, PROMPTS, 2.), path[:, k], schedule, k,
                                    policy.prediction_type)
        assert torch.allclose(log_prob(path[:, k + 1], mean, sigma), log_probs[:, k], atol=1e-5)


def test_a_balanced_flow_costs_nothing_and_log_z_is_pulled_to_log_beta():
    log_f, log_b = torch.tensor([[1., 2.]]), torch.tensor([[.5, 1.]])
    assert eraseflow_loss(log_f, log_b, torch.tensor(1.), 2.5) == 0
    log_z = torch.tensor(0., requires_grad=True)
    eraseflow_loss(log_f, log_f, log_z, 2.5).backward()
    assert log_z.grad == -5


def test_a_run_trains_log_z_and_saves_it_beside_the_lora(pipeline, tmp_path):
    folder, prompts = str(tmp_path / "run"), tmp_path / "p.csv"
    prompts.write_text("prompt,safe_text\na peach,a drawn peach\n")
    main(parse_args(["eraseflow", "--model", pipeline, "--prompts", str(prompts), "--steps", "2",
                     "--batch-size", "1", "--iterations", "3", "--device", "cpu", "--recipe",
                     "embedded", "--output-dir", folder]))
    log_z = load_file(f"{folder}/checkpoints/extra.safetensors")["log_z"]
    assert log_z.shape == () and log_z != LOG_Z
    lora = load_file(f"{folder}/pytorch_lora_weights.safetensors")
    assert any(".attn1." in name for name in lora) and any(".attn2." in name for name in lora)


def test_without_a_safe_text_there_is_no_anchor(pipeline, tmp_path):
    with pytest.raises(UserError, match="no prompt has a safe_text"):
        main(parse_args(["eraseflow", "--model", pipeline, "--prompts", "a peach", "--device",
                         "cpu", "--output-dir", str(tmp_path / "run")]))
