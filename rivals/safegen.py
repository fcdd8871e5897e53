"""SafeGen (Li et al., CCS 2024, arXiv 2404.06666): self-attention that mosaics nudity, unprompted.

Ours: the pictures are the model's own, those of --prompts that trip the detector and those of
--benign that do not, and the mosaic is the picture in MOSAIC x MOSAIC squares; the authors have
real pictures and a learned mosaic of their parts. Pictures stay in memory, none is written, and
their latents are the encoder's mode, with a timestep each (theirs: drawn anew at every step, a nude
picture and its benign one at the same timestep). As theirs, gradients are clipped at a norm of 1
and the average of the weights is what is saved; AdamW has no weight decay (theirs 1e-2).

Letters: n nude, m mosaic, b benign; z latents (B, C, h, w) of pictures, x noised ones; e the noise;
a alpha-bar.
"""
import numpy as np
import torch

from ddpo import draw_noise, velocity
from plumbing.options import UserError
from plumbing.plots import pixelate
from prompts import cycle_prompts
from reward import THRESHOLD, Nudity, worst_label
from rivals import Edit
from rivals.editing import to_latents

MOSAIC = 4      # of the embedded world's mosaics of 8 x 8 squares 29 % trip the detector after the
#                 VAE, of 4 x 4 ones 2 %
LEAST_SIGNAL = .004     # of a v network's alpha-bar: Stable Diffusion's own ends at .0047


def safegen_loss(e_n, target_n, e_b, target_b, weight=.1):
    """w || e_theta(x_n, t) - (z_n - z_m + e) ||^2 + (1 - w) || e_theta(x_b, t) - e_b ||^2.

    All (B, C, h, w); the targets as `target` has them.
    """
    mosaic_part = ((e_n - target_n) ** 2).mean()
    benign_part = ((e_b - target_b) ** 2).mean()
    return weight * mosaic_part + (1 - weight) * benign_part


def target(z, away, e, a, prediction_type):
    """What the network should put out at x = sqrt(a) z + sqrt(1 - a) e: the noise away + e.

    away is z_n - z_m, of the clean latents, or 0. A v network's is that noise turned into v at x,
    (away + e - sqrt(1 - a) x) / sqrt(a), shortened: every network is to draw the same picture, and
    v's error is epsilon's / a. The authors take the velocity of (z_n - z_m, e), which is not where
    x lies.
    """
    if prediction_type == "epsilon":
        return away + e
    return velocity(z, e, a) + away / a.sqrt()


def step(job, prompts, rng):
    """Random triples at random timesteps, without a prompt: prompts are not looked at.

    A v network's timesteps of next to no signal, of which a zero-terminal-SNR schedule has some,
    are not drawn: 1 / sqrt(a) has no bound there.
    """
    policy, size, kind = job.policy, job.args.batch_size, job.policy.prediction_type
    nude, mosaic, benign = job.data
    alphas = policy.scheduler.alphas_cumprod.to(policy.device)
    i, j = rng.integers(len(nude), size=size), rng.integers(len(benign), size=size)
    seeds = rng.integers(2 ** 62, size=2 * size)
    e = draw_noise(seeds, 0, nude.shape[1:])[:, 0].to(policy.device)            # (2B, C, h, w)
    count = len(alphas) if kind == "epsilon" else int((alphas >= LEAST_SIGNAL).sum())
    t = torch.from_numpy(rng.integers(count, size=2 * size)).to(policy.device)  # (2B,)
    a = alphas[t].view(-1, 1, 1, 1)
    z = torch.cat([nude[i], benign[j]])
    away = torch.cat([nude[i] - mosaic[i], torch.zeros_like(benign[j])])
    x = a.sqrt() * z + (1 - a).sqrt() * e
    output_n, output_b = policy.unet_output(x, t, policy.encode([""] * (2 * size))).split(size)
    target_n, target_b = target(z, away, e, a, kind).split(size)
    return safegen_loss(output_n, target_n, output_b, target_b, job.args.mosaic_weight)


# ---- the pictures --------------------------------------------------------------------------------

def prepare(job, prompts, benign, labels):
    """Make job.data, latents (nude, mosaic, benign) of the base's pictures; no extra tensors."""
    args = job.args
    if not benign:
        raise UserError(f"--benign: {args.edit} needs prompts of what has to stay; "
                        "give a file or a text")
    nudity = Nudity(device=job.policy.device)

    def draw(source):
        picked, seeds = cycle_prompts(source, args.pictures, args.seed)
        pictures = job.draw(picked, seeds)                                      # (N, H, W, 3)
        return pictures, worst_label(nudity(pictures), labels) >= THRESHOLD
    pictures, is_nude = draw(prompts)
    nude = pictures[is_nude]
    pictures, is_nude = draw(benign)
    harmless = pictures[~is_nude]
    if not len(nude) or not len(harmless):
        raise UserError(f"--pictures: of {args.pictures} pictures each, {len(nude)} of --prompts "
                        f"trip the detector and {len(harmless)} of --benign do not; {args.edit} "
                        "needs some of both")
    print(f"triples        {len(nude)} nude pictures and their mosaics, {len(harmless)} benign "
          "ones", flush=True)
    mosaics = pixelate(nude, np.ones(len(nude), bool), MOSAIC)
    job.data = [to_latents(job.policy, part) for part in (nude, mosaics, harmless)]


# the embedded world's rate and weight are the best of the few in results/log.md; its LoRA's rate is
# not tried
SAFEGEN = Edit(
    step, "SafeGen, arXiv 2404.06666", weights=r".*attn1", prepare=prepare,
    uses=("benign", "mosaic_weight", "pictures", "guidance", "unsafe_labels", "ema"),
    keeps_average=True, ramps=True, max_grad_norm=1., settings={
        "embedded": {
            "iterations": 300,
            "lr": 3e-4,
            "lora_lr": 1e-3,
            "batch_size": 16,
            "mosaic_weight": .5,
            "ema": .9999,
            "pictures": 256,
        },
        "stable_diffusion": {           # the authors', five triples an update; how many pictures is
                                        # ours
            "iterations": 1000,
            "lr": 1e-5,
            "batch_size": 5,
            "mosaic_weight": .1,
            "ema": .9999,
            "pictures": 256,
        },
    })
