"""ddpo.py against diffusers, torch.distributions and hand-computed numbers."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler

from ddpo import (
    RewardMemory,
    advantages,
    ddim_mean,
    ddim_schedule,
    decisions,
    denoise,
    draw_noise,
    draw_steps,
    log_prob,
    mean_distance,
    pairs,
    ppo_loss,
    renoise,
    rollout,
    step_mean,
    velocity,
)
from prompts import Prompt


def scheduler(prediction_type="epsilon", **options):
    return DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear",
                         clip_sample=False, set_alpha_to_one=False, steps_offset=1,
                         prediction_type=prediction_type, **options)


def schedule_of(steps, eta):
    theirs = scheduler()
    theirs.set_timesteps(steps)
    return ddim_schedule(theirs.alphas_cumprod, theirs.timesteps, eta)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [.2, 1.])
@pytest.mark.parametrize("steps", [5, 20, 50])
def test_the_step_equals_diffusers_ddim(steps, eta, kind):
    theirs = scheduler(kind)
    theirs.set_timesteps(steps)
    ours = ddim_schedule(theirs.alphas_cumprod, theirs.timesteps, eta)
    torch.manual_seed(0)
    for k, t in enumerate(theirs.timesteps):
        x, output, z = torch.randn(3, 2, 4, 8, 8)
        mean = ddim_mean(x, output, ours.a_t[k], ours.a_prev[k], ours.sigma[k], kind)
        drawn = theirs.step(output, t, x, eta=eta, variance_noise=z).prev_sample
        no_noise = torch.zeros_like(z)
        their_mean = theirs.step(output, t, x, eta=eta, variance_noise=no_noise).prev_sample
        assert torch.allclose(mean, their_mean, atol=2e-5, rtol=1e-5)
        assert torch.allclose(mean + ours.sigma[k] * z, drawn, atol=2e-5, rtol=1e-5)
        variance = theirs._get_variance(t, t - 1000 // steps)
        assert math.isclose(ours.sigma[k].item(), eta * variance.sqrt().item(), rel_tol=1e-3)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_step_begun_anew_scores_by_the_loss_of_diffusers_training_scripts(prediction_type):
    """Times the squared share of its output in a step's mean, over 2 sigma^2: the bound's weight.
    What is compared are two networks, so that constants fall out."""
    theirs = DDIMScheduler(prediction_type=prediction_type)
    schedule = ddim_schedule(theirs.alphas_cumprod, [801, 601, 401, 201, 1], 1.)
    x0 = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(3, 4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    steps = torch.tensor([0, 2, 2, 4])
    (starts, decided, ours), (_, _, other) = (
        renoise(lambda x, t, share=share: share * x, x0, noise, schedule, steps, prediction_type)
        for share in (.3, .7))
    for d, k in enumerate(steps):
        t = schedule.t[k].expand(3)
        noisy = theirs.add_noise(x0, noise[:, d], t)
        assert torch.allclose(starts[:, d], noisy, atol=1e-6)
        target = (noise[:, d] if prediction_type == "epsilon"
                  else theirs.get_velocity(x0, noise[:, d], t))
        loss, other_loss = (F.mse_loss(share * noisy, target, reduction="none").mean((1, 2, 3))
                            for share in (.3, .7))
        a_t, a_prev, sigma = (float(row[k]) for row in schedule[1:])
        of_noise = (1 - a_prev - sigma ** 2) ** .5
        share = (of_noise - (a_prev * (1 - a_t) / a_t) ** .5 if prediction_type == "epsilon"
                 else of_noise * a_t ** .5 - (a_prev * (1 - a_t)) ** .5)
        weight = share ** 2 / (2 * sigma ** 2)
        difference = ours[:, d] - other[:, d]
        assert torch.allclose(difference, weight * (other_loss - loss), rtol=1e-3, atol=1e-5)
        aim = a_prev ** .5 * x0 + of_noise * noise[:, d]        # DDIM's step to the picture
        assert torch.allclose(decided[:, d], aim, atol=1e-4)


def test_the_velocity_is_diffusers_own():
    theirs = scheduler("v_prediction")
    torch.manual_seed(0)
    x0, eps = torch.randn(2, 5, 4, 8, 8)
    t = torch.tensor([0, 10, 300, 700, 999])
    a_t = theirs.alphas_cumprod[t].view(-1, 1, 1, 1)
    assert torch.allclose(velocity(x0, eps, a_t), theirs.get_velocity(x0, eps, t), atol=1e-5)


def test_the_log_probability_is_the_mean_of_torch_distributions_normal():
    torch.manual_seed(0)
    x, mean = torch.randn(2, 5, 4, 8, 8)
    theirs = torch.distributions.Normal(mean, torch.tensor(.3)).log_prob(x).mean((1, 2, 3))
    assert torch.allclose(log_prob(x, mean, torch.tensor(.3)), theirs, atol=1e-5)


@pytest.mark.parametrize("eta", [-.1, 1.1])
def test_an_eta_that_is_no_share_is_refused(eta):
    with pytest.raises(ValueError, match="eta"):
        ddim_schedule(scheduler().alphas_cumprod, [801, 401, 1], eta)


def test_a_schedule_that_ends_at_timestep_zero_is_refused():
    with pytest.raises(ValueError, match="steps_offset"):
        ddim_schedule(scheduler().alphas_cumprod, [800, 400, 0], 1.)


def test_eta_zero_draws_what_diffusers_draws_and_has_no_log_probability():
    theirs, schedule = scheduler(), schedule_of(5, 0.)
    theirs.set_timesteps(5)
    torch.manual_seed(0)
    network = torch.nn.Conv2d(4, 4, 3, padding=1)
    x = torch.randn(2, 4, 8, 8)
    noise = torch.cat([x[:, None], torch.randn(2, 5, 4, 8, 8)], 1)
    ours = denoise(lambda x, t: network(x), noise, schedule)
    for t in theirs.timesteps:
        with torch.no_grad():
            x = theirs.step(network(x), t, x, eta=0.).prev_sample
    assert torch.allclose(ours, x, atol=1e-4)
    with pytest.raises(ValueError, match="no log-probability"):
        rollout(lambda x, t: network(x), noise, schedule)


def test_what_was_drawn_scores_as_it_was_drawn():
    network = torch.nn.Conv2d(4, 4, 3, padding=1)
    schedule = schedule_of(6, 1.)

    def predict(x, t):
        return network(x)
    latents, log_probs = rollout(predict, torch.randn(3, 7, 4, 8, 8), schedule)
    assert latents.shape == (3, 7, 4, 8, 8) and log_probs.shape == (3, 6)
    assert not log_probs.requires_grad
    for k in range(6):
        mean, sigma = step_mean(predict, latents[:, k], schedule, k)
        again = log_prob(latents[:, k + 1], mean, sigma)
        assert torch.equal(again.detach(), log_probs[:, k]) and again.requires_grad


def test_the_expected_decision_is_ddims_own_step_to_the_finished_picture():
    """DDIM, told that the picture is x_0, would step to it; the last step's is what was drawn."""
    theirs, schedule = scheduler(), schedule_of(5, 1.)
    theirs.set_timesteps(5)
    torch.manual_seed(0)
    network = torch.nn.Conv2d(4, 4, 3, padding=1)
    latents, log_probs = rollout(
        lambda x, t: network(x), torch.randn(2, 6, 4, 8, 8), schedule, which="expected")
    decided = decisions(latents, schedule, "expected")
    for k, t in enumerate(theirs.timesteps[:-1]):
        a = theirs.alphas_cumprod[t]
        noise = (latents[:, k] - a.sqrt() * latents[:, -1]) / (1 - a).sqrt()
        aim = theirs.step(noise, t, latents[:, k], eta=1.,
                          variance_noise=torch.zeros_like(noise)).prev_sample
        assert torch.allclose(decided[:, k], aim, atol=1e-4)
    assert torch.equal(decided[:, -1], latents[:, -1])
    assert torch.equal(decisions(latents, schedule), latents[:, 1:])
    assert decisions(latents, schedule).data_ptr() == latents[:, 1:].data_ptr()     # no copy
    for k in range(5):
        mean, sigma = step_mean(lambda x, t: network(x), latents[:, k], schedule, k)
        assert torch.equal(log_prob(decided[:, k], mean, sigma), log_probs[:, k])


def test_the_expected_decisions_gradient_is_the_drawn_ones_with_less_noise():
    """Numbers of variance 1/4 and their exact denoiser, a reward of the finished number: the
    gradient on a step's mean is E[r (decision - mean)]."""
    schedule = schedule_of(200, 1.)
    a = scheduler().alphas_cumprod

    def predict(x, t):
        return (1 - a[t]).sqrt() * x / (a[t] / 4 + 1 - a[t])
    torch.manual_seed(0)
    latents, *_ = rollout(predict, torch.randn(20_000, 201, 1, 1, 1), schedule)
    reward = latents[:, -1] - latents[:, -1].mean()
    for k in (100, 130, 160, 190):
        mean, _ = step_mean(predict, latents[:, k], schedule, k)
        drawn, expected = (reward * (decisions(latents, schedule, which)[:, k] - mean)
                           for which in ("drawn", "expected"))
        error = drawn.std() / 20_000 ** .5
        assert abs(expected.mean() - drawn.mean()) < 3 * error + .1 * drawn.mean()
        assert expected.mean() > 5 * expected.std() / 20_000 ** .5
        assert expected.std() < drawn.std() / 3


def test_drawing_takes_the_rollouts_steps_and_can_start_late():
    network, schedule = torch.nn.Conv2d(4, 4, 3, padding=1), schedule_of(6, 1.)
    noise = torch.randn(3, 7, 4, 8, 8)

    def predict(x, t):
        return network(x)
    latents = rollout(predict, noise, schedule)[0]
    assert torch.equal(denoise(predict, noise, schedule), latents[:, -1])
    late = torch.cat([latents[:, 2:3], noise[:, 3:]], 1)        # x at step 2, then its noises
    assert torch.equal(denoise(predict, late, schedule, start=2), latents[:, -1])


def test_noise_is_a_function_of_the_seed_alone():
    assert torch.equal(draw_noise([5, 6], 3, (4, 8, 8))[1], draw_noise([6], 3, (4, 8, 8))[0])


def test_pairs_are_every_chosen_column_of_a_picture_once_a_column_at_a_time():
    chosen = np.array([[1, 0, 1], [0, 0, 1], [1, 0, 0], [1, 1, 0]], bool)
    calls = list(pairs(chosen, 4))
    assert [len(i) for i, *_ in calls] == [4, 2]
    both = [pair for i, columns, _ in calls for pair in zip(columns, i, strict=True)]
    assert both == [(0, 0), (0, 2), (0, 3), (1, 3), (2, 0), (2, 1)]
    for i, columns, at in calls:
        assert i.tolist() == at[0].tolist() and columns.tolist() == at[1].tolist()
    assert not list(pairs(chosen & False, 4))


def test_ppo_loss_equals_numbers_computed_by_hand():
    old = torch.zeros(4)
    new = torch.log(torch.tensor([1.5, 1.5, .5, .5]))
    advantage = torch.tensor([1., -1., 1., -1.])
    # max(-A r, -A clip(r, .8, 1.2)): -1.2, 1.5, -.5, .8
    loss, diagnostics = ppo_loss(new, old, advantage, .2)
    assert loss.item() == pytest.approx((-1.2 + 1.5 - .5 + .8) / 4)
    assert diagnostics["clipped_share"] == 1
    assert diagnostics["ratio_deviation"] == pytest.approx(.5)
    k3 = (2 * (.5 - math.log(1.5)) + 2 * (-.5 - math.log(.5))) / 4
    assert diagnostics["approx_kl"].item() == pytest.approx(k3)


def test_the_advantage_is_clamped():
    loss, _ = ppo_loss(torch.zeros(1), torch.zeros(1), torch.tensor([100.]), .1)
    assert loss.item() == -5


def test_at_ratio_one_the_gradient_is_reinforces():
    log_p = torch.randn(6, requires_grad=True)
    advantage = torch.randn(6)
    ppo_loss(log_p, log_p.detach(), advantage, 1e-4)[0].backward()
    assert torch.allclose(log_p.grad, -advantage / 6)


def test_group_relative_advantages_equal_a_plain_loop():
    rng = np.random.default_rng(0)
    rewards, prompts = rng.normal(size=12).astype("float32"), list("aabbccabcabc")
    ours = advantages(torch.from_numpy(rewards), prompts, eps=1e-6)
    for i, p in enumerate(prompts):
        group = rewards[[q == p for q in prompts]]
        by_hand = (rewards[i] - group.mean()) / (group.std() + 1e-6)
        assert ours[i].item() == pytest.approx(by_hand, abs=1e-5)


def test_remembered_advantages_equal_a_plain_loop_over_epochs():
    rng = np.random.default_rng(1)
    memory, history = RewardMemory(size=5, min_count=4), {"a": [], "b": []}
    for _ in range(4):
        rewards, prompts = rng.normal(size=5).astype("float32"), list("aabaa")
        ours = advantages(torch.from_numpy(rewards), prompts, memory)
        for p in "ab":
            new = [r for r, q in zip(rewards, prompts, strict=True) if q == p]
            history[p] = (history[p] + new)[-5:]
        for i, p in enumerate(prompts):
            known = np.array(history[p]) if len(history[p]) >= 4 else rewards
            by_hand = (rewards[i] - known.mean()) / (known.std() + 1e-6)
            assert ours[i].item() == pytest.approx(by_hand, abs=1e-4)


def test_the_memory_survives_being_saved(tmp_path):
    memory, again = RewardMemory(3, 2), RewardMemory(3, 2)
    advantages(torch.tensor([1., 2., 3., 4.]), [Prompt(p) for p in "aaab"], memory)
    torch.save(memory.state_dict(), tmp_path / "memory.pt")
    again.load_state_dict(torch.load(tmp_path / "memory.pt", weights_only=True))
    args = torch.tensor([5., 6.]), list("ab")
    assert torch.equal(advantages(*args, memory), advantages(*args, again))


def test_batch_scale_does_not_blow_up_a_prompt_that_scores_alike():
    rewards = torch.tensor([0., 1., .5, .5001])
    by_prompt = advantages(rewards, list("aabb"), scale="prompt")
    by_batch = advantages(rewards, list("aabb"), scale="batch")
    assert by_prompt[3] > .9 and abs(by_batch[3]) < 1e-3


def test_the_divergence_from_the_base_equals_torch_distributions():
    torch.manual_seed(0)
    (mean, base), sigma = torch.randn(2, 3, 4, 8, 8), torch.tensor(.3)
    policy, frozen = (torch.distributions.Normal(m, sigma) for m in (mean, base))
    theirs = torch.distributions.kl_divergence(policy, frozen).flatten(1).mean(1)
    assert torch.allclose(mean_distance(mean, base) / (2 * sigma ** 2), theirs, rtol=1e-5)


@pytest.mark.parametrize("value", [.95, 77.7, 1000.1])
@pytest.mark.parametrize("scale", ["batch", "prompt", "memory"])
def test_rewards_that_are_all_alike_teach_nothing(value, scale):
    """The mean of equal numbers is rounded, which divided by 1e-6 would be an advantage."""
    for count in (7, 8):
        memory = RewardMemory(min_count=1) if scale == "memory" else None
        how = "batch" if scale == "batch" else "prompt"
        assert not advantages(torch.full((count,), value), ["a"] * count, memory, how).any()


def test_a_picture_is_pulled_at_a_learned_step_and_at_another():
    steps = draw_steps(np.random.default_rng(0), 2, 6, 8000)
    assert steps.shape == (8000, 2)
    assert np.allclose(np.bincount(steps[:, 0]) / 8000, .5, atol=.02)
    assert np.allclose(np.bincount(steps[:, 1]) / 8000, [0, 0, .25, .25, .25, .25], atol=.02)
    alone = draw_steps(np.random.default_rng(0), 3, 3, 900)     # where all steps are learned from
    assert alone.shape == (900, 1) and set(alone.flat) == {0, 1, 2}
