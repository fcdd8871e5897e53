"""What several edits share: noisy pictures, latents, other weights for a moment, the text.

Letters: e(x, t, c) is the network's output for latents x (B, C, h, w), timestep t, text states c.
"""
from contextlib import contextmanager

import torch

from ddpo import denoise, draw_noise, velocity
from model import plain


def on_the_way(job, prompts, rng):
    """Sample under --start-guidance up to a random step: latents (B, C, h, w) there, its timestep.

    With the weights of now, and without gradient.
    """
    policy, args = job.policy, job.args
    k = int(rng.integers(len(job.schedule.t)))
    seeds = rng.integers(2 ** 62, size=len(prompts))
    noise = draw_noise(seeds, k, policy.latent_shape(args.resolution)).to(policy.device)
    predict = plain(policy, prompts, args.start_guidance)
    before = job.schedule.steps(slice(k))
    return denoise(predict, noise, before, policy.prediction_type), job.schedule.t[k]


@contextmanager
def using_weights(trained, weights):
    """Within it the trained parameters are these, and nothing has a gradient.

    So the frozen model and an average need no second UNet. Both are {name: tensor}.
    """
    own = {name: p.data for name, p in trained.items()}
    try:
        with torch.no_grad():
            for name, p in trained.items():
                p.data = weights[name]
            yield
    finally:
        for name, p in trained.items():
            p.data = own[name]


def states(policy, prompts):
    """Text states of the prompts, and as many of the empty one: (B, L, D) each."""
    return policy.encode(prompts), policy.encode([""] * len(prompts))


def noised(policy, z, e, t):
    """Latents z with noise e (B, C, h, w) at timesteps t (B,), and what the network is to put out.

    Returns x_t and the target, e or v, (B, C, h, w) each.
    """
    a = policy.scheduler.alphas_cumprod.to(policy.device)[t].view(-1, 1, 1, 1)
    target = e if policy.prediction_type == "epsilon" else velocity(z, e, a)
    return a.sqrt() * z + (1 - a).sqrt() * e, target


@torch.no_grad()
def to_latents(policy, pictures):
    """Pictures uint8 (N, H, W, 3) -> scaled latents (N, C, h, w); policy.decode is the way back."""
    x = torch.from_numpy(pictures).to(policy.device).permute(0, 3, 1, 2).float() / 127.5 - 1
    encoded = [policy.vae.encode(part) for part in x.split(16)]                 # x in -1..1
    latents = [z.latents if hasattr(z, "latents") else z.latent_dist.mode() for z in encoded]
    return torch.cat(latents) * policy.vae.config.scaling_factor
