"""The arithmetic of DDPO: denoising as a chain of Gaussian decisions, and PPO on that chain.

Black et al., "Training diffusion models with reinforcement learning", arXiv 2305.13301, with the
importance-sampled estimator (DDPO-IS) that ShieldDiff (arXiv 2410.05309) uses. Nothing here knows
a model: a policy is a function predict(x, t) -> the network's output, shaped like x.

Letters: B pictures, T steps; x latents (B, C, h, w); a_t is the scheduler's alpha-bar at step t.
Everything is float32, whatever the network computes in: rounding a latent or a log-probability to
bfloat16 moves the ratio by more than PPO's clip range allows.
"""
import math
from collections import defaultdict, deque
from typing import NamedTuple

import numpy as np
import torch

# ---- the schedule and one step -------------------------------------------------------------------

class Schedule(NamedTuple):
    """One row per denoising step, from noise to picture; each field has shape (T,)."""
    t: torch.Tensor             # int64, the timestep that the network is given
    a_t: torch.Tensor           # alpha-bar now
    a_prev: torch.Tensor        # alpha-bar after the step; the last one is alpha-bar[0], not 1
    sigma: torch.Tensor         # standard deviation of the step

    def steps(self, part):
        """The rows of a slice, as a Schedule."""
        return Schedule(*(row[part] for row in self))


def ddim_schedule(alphas_cumprod, timesteps, eta):
    """The steps of DDIM (arXiv 2010.02502, eq. 16) as a Schedule.

    alphas_cumprod: (1000,) float; timesteps: (T,) int, falling, from the scheduler's own list, so
    that any spacing works; eta in 0..1: 1 is DDPM's noise, 0 is deterministic (sigma 0: pictures
    can be drawn, but have no log-probability). The last step ends at alpha-bar[0], and so keeps
    sigma > 0 where eta is. Raises ValueError where a step should have noise and has none.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; 0 to 1 is allowed")
    t = torch.as_tensor(timesteps, dtype=torch.int64)
    a = alphas_cumprod.double()
    a_t = a[t]
    a_prev = torch.cat([a[t[1:]], a[:1]])
    sigma = eta * ((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)).sqrt()
    if eta > 0 and not (sigma > 0).all():
        raise ValueError(f"the last timestep is {int(t[-1])} and has no noise; "
                         "use a scheduler with steps_offset 1")
    return Schedule(t, a_t.float(), a_prev.float(), sigma.float())


def ddim_mean(x, output, a_t, a_prev, sigma, prediction_type="epsilon"):
    """Mean of x_prev given x and the network's output; all (B, C, h, w) or broadcastable.

    epsilon: the output is the noise. v_prediction (arXiv 2202.00512): it is `velocity`.
    """
    if prediction_type == "epsilon":
        eps = output
        x0 = (x - (1 - a_t).sqrt() * eps) / a_t.sqrt()
    elif prediction_type == "v_prediction":
        x0 = a_t.sqrt() * x - (1 - a_t).sqrt() * output
        eps = a_t.sqrt() * output + (1 - a_t).sqrt() * x
    else:
        raise ValueError(f"prediction_type is {prediction_type!r}; "
                         "epsilon and v_prediction are known")
    return a_prev.sqrt() * x0 + (1 - a_prev - sigma ** 2).clamp(min=0).sqrt() * eps


def velocity(x0, eps, a_t):
    """What a v_prediction network learns to put out: sqrt(a) eps - sqrt(1 - a) x0."""
    return a_t.sqrt() * eps - (1 - a_t).sqrt() * x0


def log_prob(x_prev, mean, sigma):
    """log N(x_prev; mean, sigma), averaged (not summed) over a picture's latent elements: (B,)."""
    z = (x_prev - mean) / sigma
    element = -z ** 2 / 2 - torch.log(sigma) - math.log(math.sqrt(2 * math.pi))
    return element.flatten(1).mean(1)


def step_mean(predict, x, schedule, k, prediction_type="epsilon"):
    """The mean of step k (one number, or one per row, (B,)) from latents x, and its sigma.

    Drawing (rollout, denoise) and learning share it, so that the ratio starts at 1.
    """
    a_t, a_prev, sigma = (row[k].view(-1, 1, 1, 1) for row in schedule[1:])     # (B or 1, 1, 1, 1)
    output = predict(x, schedule.t[k]).float()
    return ddim_mean(x, output, a_t, a_prev, sigma, prediction_type), sigma


def mean_distance(mean, aim):
    """Squared distance of two means of a step, (B,), averaged over a picture's latent elements.

    Over 2 sigma^2 it is KL(policy || aim) of the step, exactly, since both are Gaussians of the
    same sigma (DPOK, arXiv 2305.16381, eq. 8). Left undivided: sigma falls to a few percent at the
    last steps, whose KL would be a thousand times the first one's and the only one to count.
    """
    return ((mean - aim) ** 2).flatten(1).mean(1)


# ---- whole trajectories --------------------------------------------------------------------------

def draw_noise(seeds, steps, shape):
    """(B, steps + 1, *shape) standard normal on the CPU, row b a function of seeds[b] alone."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(int(seed) % 2 ** 63)
        rows.append(torch.randn(steps + 1, *shape, generator=generator))
    return torch.stack(rows)


@torch.no_grad()
def rollout(predict, noise, schedule, prediction_type="epsilon", which="drawn", tick=lambda: None):
    """Denoise, remembering every decision.

    noise: (B, T + 1 or more, C, h, w) standard normal; [:, 0] is the start, [:, k + 1] the noise of
    step k. Returns latents (B, T + 1, C, h, w), the last of them the picture's, and the
    log-probabilities of the steps' `decisions`, drawn or expected, (B, T). Raises ValueError for a
    schedule without noise (eta 0).
    """
    if not (schedule.sigma > 0).all():
        raise ValueError("a step without noise has no log-probability; give eta above 0")
    x = noise[:, 0]
    latents, means = [x], []
    for k in range(len(schedule.t)):
        mean, sigma = step_mean(predict, x, schedule, k, prediction_type)
        x = mean + sigma * noise[:, k + 1]
        latents.append(x)
        means.append(mean)
        tick()
    latents = torch.stack(latents, 1)
    decided = decisions(latents, schedule, which)
    log_probs = [log_prob(decided[:, k], mean, schedule.sigma[k]) for k, mean in enumerate(means)]
    return latents, torch.stack(log_probs, 1)


@torch.no_grad()
def renoise(predict, x0, noise, schedule, steps, prediction_type="epsilon"):
    """Begin steps anew from finished latents x0 (B, C, h, w): what --loss elbo learns from.

    noise: (B, D, C, h, w) standard normal; steps: (D,) int, a step each. Returns of these D where
    they begin, sqrt(a_t) x0 + sqrt(1 - a_t) noise; what they decide, E[x_{t-1} | x_t, x0], both
    (B, D, C, h, w); and its log-probability (B, D). That is, up to a constant, minus the denoising
    loss, in the evidence lower bound's weights: what AWM (arXiv 2509.25050) puts where DDPO has the
    trajectory's own steps, there with weight 1 for each step. It looks at the picture and not at
    the luck of each step, so that its gradient is less noisy.
    """
    a_t, a_prev, sigma = (row[steps].view(-1, 1, 1, 1) for row in schedule[1:])     # (D, 1, 1, 1)
    starts = a_t.sqrt() * x0[:, None] + (1 - a_t).sqrt() * noise
    decided = ddim_mean(starts, noise, a_t, a_prev, sigma)
    log_probs = [log_prob(decided[:, d], *step_mean(predict, starts[:, d], schedule,
                                                    k.expand(len(x0)), prediction_type))
                 for d, k in enumerate(steps)]
    return starts, decided, torch.stack(log_probs, 1)


def decisions(latents, schedule, which="drawn"):
    """What each step of trajectories has decided, whose log-probability PPO moves: (B, T, C, h, w).

    latents: (B, T + 1, C, h, w), of a rollout. "drawn" (DDPO): x_{t-1}, as it was drawn. Most of
    its noise is luck that the picture does not show, and that the reward cannot have seen.
    "expected": E[x_{t-1} | x_t, x_0], the mean of what the step may have drawn, given where it
    began and which picture came of it, after DDIM's forward process (arXiv 2010.02502, eq. 7); of
    the last step, what was drawn. Where the model reverses that process exactly, in many steps and
    without guidance, the policy gradient keeps its expectation and loses noise (Rao-Blackwell: a
    reward of x_0 alone, times d log p, which is linear in x_{t-1}). Elsewhere this is an
    approximation: a step answers for a part of what later ones did.
    """
    if which == "drawn":
        return latents[:, 1:]
    a_t, a_prev, sigma = (row.view(-1, 1, 1, 1) for row in schedule[1:])        # (T, 1, 1, 1)
    x, x0 = latents[:, :-1], latents[:, -1:]
    expected = ddim_mean(x, (x - a_t.sqrt() * x0) / (1 - a_t).sqrt(), a_t, a_prev, sigma)
    expected[:, -1] = latents[:, -1]
    return expected


@torch.no_grad()
def denoise(predict, noise, schedule, prediction_type="epsilon", start=0, tick=lambda: None):
    """Draw pictures' latents (B, C, h, w), remembering nothing; eta 0 is allowed.

    start: the first step taken; noise[:, 0] is x at that step, noise[:, 1 + i] the noise of the
    i-th step taken. The steps are rollout's own.
    """
    x = noise[:, 0]
    for i, k in enumerate(range(start, len(schedule.t))):
        mean, sigma = step_mean(predict, x, schedule, k, prediction_type)
        x = mean + sigma * noise[:, i + 1]
        tick()
    return x


def pairs(chosen, size, device="cpu"):
    """The pairs (picture, column) at which chosen (n, M) bool is True, `size` of them per call.

    A column at a time, from the first on. Yields pictures i and columns as int arrays (size,), and
    `at`, both as tensors on `device`: all brought there at once, since a GPU's tensor that is
    indexed from the CPU makes the CPU wait for it.
    """
    columns, i = np.nonzero(chosen.T)
    both = [torch.from_numpy(index).to(device, non_blocking=True) for index in (i, columns)]
    for start in range(0, len(i), size):
        part = slice(start, start + size)
        yield i[part], columns[part], (both[0][part], both[1][part])


def draw_steps(rng, learned, steps, count):
    """Where `count` pictures are pulled: one of the first `learned` steps, and one of the others.

    The latter, from which nothing is learned, change along, as all steps share their weights.
    Returns int (count, 2), or (count, 1) where all steps are learned from.
    """
    chosen = [rng.integers(learned, size=count)]
    if learned < steps:
        chosen.append(rng.integers(learned, steps, count))
    return np.stack(chosen, 1)


# ---- the advantage and the loss ------------------------------------------------------------------

class RewardMemory:
    """Each prompt's recent rewards: the baseline of DDPO's per-prompt advantage (section 4.4)."""

    def __init__(self, size=32, min_count=16):
        self.size, self.min_count = size, min_count
        self.rewards = defaultdict(lambda: deque(maxlen=size))

    def state_dict(self):
        return {str(prompt): list(rewards) for prompt, rewards in self.rewards.items()}

    def load_state_dict(self, state):
        self.rewards.clear()
        for prompt, rewards in state.items():
            self.rewards[prompt].extend(rewards)


def advantages(rewards, prompts, memory=None, scale="prompt", least_spread=0., eps=1e-6):
    """How much better than expected each picture is: (B,) rewards -> (B,) float32.

    With a RewardMemory: (r - mean) / (std + eps) over the prompt's remembered rewards, these
    included; a prompt with fewer than `min_count` of them uses the whole batch's. Without: over the
    prompt's pictures in this batch (group-relative, arXiv 2402.03300). scale="batch" divides by the
    root mean square of all that remains after the means, so that a prompt whose pictures all score
    alike is not blown up to unit size; scale="prompt" is the papers'. least_spread: what is divided
    by at least, so that late in training, when nearly all pictures are alike, little is learned.
    """
    rewards = rewards.float()
    groups = defaultdict(list)
    for i, prompt in enumerate(prompts):
        groups[prompt].append(i)
    centred = torch.zeros_like(rewards)
    std = torch.ones_like(rewards)
    for prompt, members in groups.items():
        reference = rewards[members]
        if memory is not None:
            memory.rewards[prompt].extend(reference.tolist())
            known = memory.rewards[prompt]
            enough = len(known) >= memory.min_count
            reference = torch.tensor(list(known)).to(rewards) if enough else rewards
        if reference.min() == reference.max():          # else the mean's rounding would teach
            continue
        centred[members] = rewards[members] - reference.mean()
        std[members] = reference.std(correction=0)
    if scale == "batch":
        std = centred.square().mean().sqrt()
    return centred / (std.clamp(min=least_spread) + eps)


def ppo_loss(log_p, log_p_old, advantage, clip_range, max_advantage=5.):
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7), to be minimised; all inputs (B,).

    clip_range bounds the ratio of log-probabilities that are *means* over latent elements: for a
    latent of D numbers the picture's true ratio may move by (1 + clip_range) ** D, which at 1e-4 is
    5.15 for Stable Diffusion's D = 16384. 1.6e-3 is as wide for the embedded world's D = 1024; its
    recipe, chosen by trial, has 5e-3, which is a factor of 165.
    At ratio 1 the gradient is REINFORCE's, -A grad log p.
    """
    advantage = advantage.clamp(-max_advantage, max_advantage)
    log_ratio = log_p - log_p_old
    ratio = torch.exp(log_ratio)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(-advantage * ratio, -advantage * clipped).mean()
    with torch.no_grad():
        diagnostics = {
            "ratio_deviation": (ratio - 1).abs().max(),
            "clipped_share": ((ratio - 1).abs() > clip_range).float().mean(),
            "approx_kl": ((ratio - 1) - log_ratio).mean(),      # >= 0, John Schulman's k3
        }
    return loss, diagnostics
