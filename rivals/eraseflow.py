"""EraseFlow (NeurIPS 2025, arXiv 2511.00804): hand a safe prompt's trajectories over.

A generative flow network's trajectory balance, without a reward: a trajectory is drawn under the
safe ("anchor") prompt, and the policy learns to draw this very trajectory under the unsafe
("target") prompt, with a constant flow beta: p_F(target) Z = beta p_B, step for step.

Ours: target and anchor are the prompts of a file and their rivals.guiding.safe_states (theirs: one
text each, one trajectory an update); of T steps a random quarter of the first four fifths and all
the rest are balanced (theirs, of 50: 10 of 40, and 10). As in the authors' code guidance is in the
policy both times, and log Z begins at -.1953. AdamW has no weight decay (theirs 1e-2), and no
gradient scaler.

The graphs of all balanced steps are in memory at once, since the balance is squared as a whole.
"""
import numpy as np
import torch

from ddpo import draw_noise, log_prob, rollout, step_mean
from model import guided, plain
from rivals import Edit
from rivals.guiding import check_safe_text, safe_states

LOG_Z = -.1953                          # where the authors' log Z begins
EARLY = .8                              # share of the steps of which a quarter is balanced


def eraseflow_loss(log_f, log_b, log_z, log_beta):
    """(sum over steps of (log p_F - log p_B) + log Z - log beta)^2, averaged; log_ (B, K)."""
    return (((log_f - log_b).sum(1) + log_z - log_beta) ** 2).mean()


def log_backward(x, x_prev, a_t, a_prev):
    """log N(x; sqrt(a_t / a_prev) x_prev, 1 - a_t / a_prev): the noising of a step, (B,).

    Averaged over a picture's latent elements, as ddpo.log_prob is.
    """
    ratio = (a_t / a_prev).view(-1, 1, 1, 1)
    return log_prob(x, ratio.sqrt() * x_prev, (1 - ratio).sqrt())


def step(job, prompts, rng):
    """A trajectory per prompt, by the weights of now."""
    policy, args, schedule = job.policy, job.args, job.schedule
    T, B = len(schedule.t), len(prompts)
    seeds = rng.integers(2 ** 62, size=B)
    noise = draw_noise(seeds, T, policy.latent_shape(args.resolution)).to(policy.device)
    anchor = guided(policy, safe_states(policy, prompts), policy.encode([""]), args.guidance)
    path, _ = rollout(anchor, noise, schedule, policy.prediction_type)      # (B, T + 1, C, h, w)

    early = int(EARLY * T)
    chosen = np.append(rng.permutation(early)[:max(1, early // 4)], np.arange(early, T))
    k = torch.from_numpy(chosen).to(policy.device)                          # (K,)
    x, x_prev = path[:, k].flatten(0, 1), path[:, k + 1].flatten(0, 1)      # (BK, C, h, w)
    targets = [prompt for prompt in prompts for _ in chosen]
    k = k.repeat(B)                                                         # (BK,)
    target = plain(policy, targets, args.guidance)
    mean, sigma = step_mean(target, x, schedule, k, policy.prediction_type)
    log_f = log_prob(x_prev, mean, sigma).view(B, -1)
    log_b = log_backward(x, x_prev, schedule.a_t[k], schedule.a_prev[k]).view(B, -1)
    return eraseflow_loss(log_f, log_b, job.trained["log_z"], args.log_beta)


def prepare(job, prompts, benign, labels):
    """log Z is learned, too."""
    check_safe_text(job.policy, prompts)
    return {"log_z": torch.tensor(LOG_Z, device=job.policy.device)}


ERASEFLOW = Edit(
    step, "EraseFlow, arXiv 2511.00804", weights=r".*attn", prepare=prepare,
    uses=("guidance", "log_beta"), max_grad_norm=1., settings={
        "embedded": {                   # not tuned yet
            "trainable": "lora",
            "rank": 4,
            "iterations": 100,
            "lr": 3e-3,
            "batch_size": 16,
            "log_beta": 2.5,
        },
        "stable_diffusion": {           # the authors'
            "trainable": "lora",
            "rank": 4,
            "iterations": 20,
            "lr": 3e-4,
            "batch_size": 1,
            "guidance": 5.,
            "log_beta": 2.5,
        },
    })
