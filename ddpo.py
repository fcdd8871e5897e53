"""The arithmetic of DDPO: denoising as a chain of Gaussian decisions, and PPO on that chain.

Black et al., "Training diffusion models with reinforcement learning", arXiv 2305.13301, with the
importance-sampled estimator (DDPO-IS) that ShieldDiff (arXiv 2410.05309) uses. Nothing here knows a
model: a policy is a function predict(x, t) -> the network's output, shaped like x.

Letters: B pictures, T steps; x latents (B, C, H, W); a_t is the scheduler's alpha-bar at step t.
Everything is float32, whatever the network computes in: rounding a latent or a log-probability to
bfloat16 moves the ratio by more than PPO's clip range allows.
"""
import math
from collections import defaultdict, deque
from typing import NamedTuple

import torch


class Schedule(NamedTuple):
    """One row a denoising step, from noise to picture; each field has shape (T,)."""
    t: torch.Tensor             # int64, what the network is told
    a_t: torch.Tensor           # alpha-bar now
    a_prev: torch.Tensor        # alpha-bar after the step; the last one is alpha-bar[0], not 1
    sigma: torch.Tensor         # standard deviation of the step, > 0


def ddim_schedule(alphas_cumprod, timesteps, eta):
    """The steps of DDIM (arXiv 2010.02502, eq. 16) as a Schedule.

    alphas_cumprod: (1000,) float; timesteps: (T,) int, falling, from the scheduler's own list, so
    that any spacing works; eta in (0, 1], 0 would be deterministic. The last step ends at
    alpha-bar[0], and so keeps sigma > 0. Raises ValueError where a step has no noise.
    """
    if eta <= 0:
        raise ValueError(f"eta is {eta}: a deterministic step has no log-probability; give 0 < eta <= 1")
    t = torch.as_tensor(timesteps, dtype=torch.int64)
    a = alphas_cumprod.double()
    a_t, a_prev = a[t], torch.cat([a[t[1:]], a[:1]])
    sigma = eta * ((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)).sqrt()
    if not (sigma > 0).all():
        raise ValueError(f"the last timestep is {int(t[-1])} and has no noise; use a scheduler with steps_offset 1")
    return Schedule(t, a_t.float(), a_prev.float(), sigma.float())


def ddim_mean(x, output, a_t, a_prev, sigma, prediction_type="epsilon"):
    """Mean of x_prev given x and the network's output; all (B, C, H, W) or broadcastable.

    epsilon: the output is the noise. v_prediction (arXiv 2202.00512): it is sqrt(a) eps - sqrt(1-a) x0.
    """
    if prediction_type == "epsilon":
        eps = output
        x0 = (x - (1 - a_t).sqrt() * eps) / a_t.sqrt()
    elif prediction_type == "v_prediction":
        x0 = a_t.sqrt() * x - (1 - a_t).sqrt() * output
        eps = a_t.sqrt() * output + (1 - a_t).sqrt() * x
    else:
        raise ValueError(f"prediction_type is {prediction_type!r}; epsilon and v_prediction are known")
    return a_prev.sqrt() * x0 + (1 - a_prev - sigma ** 2).clamp(min=0).sqrt() * eps


def log_prob(x_prev, mean, sigma):
    """log N(x_prev; mean, sigma), averaged (not summed) over a picture's latent elements: (B,)."""
    z = (x_prev - mean) / sigma
    element = -z ** 2 / 2 - torch.log(sigma) - math.log(math.sqrt(2 * math.pi))
    return element.flatten(1).mean(1)


def mean_distance(mean, base_mean):
    """Squared distance of two means of a step, (B,), averaged over a picture's latent elements.

    Over 2 sigma^2 it is KL(policy || base) of the step, exactly, since both are Gaussians of the same
    sigma (DPOK, arXiv 2305.16381, eq. 8). Left undivided: sigma falls to a few percent at the last
    steps, whose KL would be a thousand times the first one's and the only one to count.
    """
    return ((mean - base_mean) ** 2).flatten(1).mean(1)


def step_log_prob(predict, x, x_prev, schedule, k, prediction_type="epsilon"):
    """The policy's mean at step k (a number, or one a row, (B,)), and its log-probability (B,) of having
    gone from x to x_prev.

    The step that draws (rollout) is this step with x_prev=None: then x_prev is drawn by the caller.
    """
    a_t, a_prev, sigma = (row[k].view(-1, 1, 1, 1) for row in schedule[1:])  # (B or 1, 1, 1, 1)
    mean = ddim_mean(x, predict(x, schedule.t[k]).float(), a_t, a_prev, sigma, prediction_type)
    return mean, None if x_prev is None else log_prob(x_prev, mean, sigma)


def rollout(predict, noise, schedule, prediction_type="epsilon", tick=lambda: None, keep=None):
    """Denoise, remembering every decision.

    noise: (B, T + 1, C, H, W) standard normal, [:, 0] the start, [:, k + 1] the noise of step k.
    keep: None, or one of onpolicy.py, which is given the log-probabilities of its steps with their gradients.
    Returns latents (B, T + 1, C, H, W), the last of them the picture's, and log-probs (B, T), both without gradients.
    """
    x, latents, log_probs = noise[:, 0], [noise[:, 0]], []
    for k in range(len(schedule.t)):
        learned = keep is not None and k in keep.steps
        with keep.watching() if learned else torch.no_grad():
            mean, _ = step_log_prob(predict, x, None, schedule, k, prediction_type)
            x = (mean + schedule.sigma[k] * noise[:, k + 1]).detach()
            decided = log_prob(x, mean, schedule.sigma[k])
            if learned:
                keep(decided)
        log_probs.append(decided.detach())
        latents.append(x)
        tick()
    return torch.stack(latents, 1), torch.stack(log_probs, 1)


class RewardMemory:
    """Each prompt's recent rewards: the baseline of DDPO's per-prompt advantage (its section 4.4)."""

    def __init__(self, size=32, min_count=16):
        self.size, self.min_count = size, min_count
        self.rewards = defaultdict(lambda: deque(maxlen=size))

    def state_dict(self):
        return {str(prompt): list(rewards) for prompt, rewards in self.rewards.items()}

    def load_state_dict(self, state):
        self.rewards.clear()
        for prompt, rewards in state.items():
            self.rewards[prompt].extend(rewards)


def advantages(rewards, prompts, memory=None, scale="prompt", floor=1e-6):
    """How much better than expected each picture is: (B,) rewards -> (B,) float32.

    With a RewardMemory: (r - mean) / (std + floor) over the prompt's remembered rewards, these
    included; a prompt with fewer than `min_count` uses the whole batch's. Without: over the
    prompt's pictures in this batch (group-relative, arXiv 2402.03300). scale="batch" divides by the
    root mean square of all that remains after the means, so that a prompt whose pictures all score
    alike is not blown up to unit size; scale="prompt" is the papers'.
    """
    rewards = rewards.float()
    groups = defaultdict(list)
    for i, prompt in enumerate(prompts):
        groups[prompt].append(i)
    centred, std = torch.zeros_like(rewards), torch.ones_like(rewards)
    for prompt, members in groups.items():
        reference = rewards[members]
        if memory is not None:
            memory.rewards[prompt].extend(reference.tolist())
            known = memory.rewards[prompt]
            reference = rewards if len(known) < memory.min_count else torch.tensor(list(known)).to(rewards)
        centred[members] = rewards[members] - reference.mean()
        std[members] = reference.std(correction=0)
    if scale == "batch":
        std = centred.square().mean().sqrt()
    return centred / (std + floor)


def ppo_loss(log_p, log_p_old, advantage, clip_range, max_advantage=5.):
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7), to be minimised; all inputs (B,).

    clip_range bounds the ratio of log-probabilities that are *means* over latent elements: for a
    latent of D numbers the picture's true ratio may move by (1 + clip_range) ** D, which at 1e-4 is
    5.15 for Stable Diffusion's D = 16384, and at 1.6e-3 is 5.1 for the tiny world's D = 1024.
    At ratio 1 the gradient is REINFORCE's, -A grad log p.
    """
    advantage = advantage.clamp(-max_advantage, max_advantage)
    ratio = torch.exp(log_p - log_p_old)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(-advantage * ratio, -advantage * clipped).mean()
    with torch.no_grad():
        change = log_p - log_p_old
        diagnostics = {"ratio_deviation": (ratio - 1).abs().max(),
                       "clipped_share": ((ratio - 1).abs() > clip_range).float().mean(),
                       "approx_kl": ((ratio - 1) - change).mean()}      # >= 0, John Schulman's k3
    return loss, diagnostics
