r"""Fine-tuning: an ordinary LoRA on pictures in which nothing is unsafe, and what that undoes.

After "Safety alignment backfires" (Modular LoRA, arXiv 2412.00357): a safe model that is taught
something harmless draws again what it had unlearned. Two ways: *sequential*, on top of the safe
model, whose weights stay as they are,

    python attack.py fine-tune --checkpoint out/shield --prompts task.csv \
        --output out/sequential
    python evaluate.py --checkpoint out/shield+out/sequential

and the paper's cure, *modular*, on the base, and then added:

    python attack.py fine-tune --prompts task.csv --output out/task
    python evaluate.py --checkpoint out/shield+out/task

With a prompt file of one's own, whose column `image` names a picture a row, any task; with unsafe
pictures it is relearning.

A minimal reading: the authors' code is not public. The loss is that of denoising (DDPM, arXiv
2006.11239, eq. 14), on the network's own output, epsilon or v; latents are the encoder's mode.
"""
import numpy as np
import torch
from PIL import Image

from ddpo import draw_noise
from judging.pictures import read_picture
from plumbing.options import UserError
from rivals import Edit
from rivals.editing import noised, to_latents


def step(job, prompts, rng):
    """The prompts' own pictures, each at a random timestep."""
    policy, B = job.policy, len(prompts)
    seeds = rng.integers(2 ** 62, size=B)
    t = rng.integers(len(policy.scheduler.alphas_cumprod), size=B)
    z = torch.stack([job.data[prompt.image] for prompt in prompts])             # (B, C, h, w)
    e = draw_noise(seeds, 0, z.shape[1:])[:, 0].to(policy.device)
    t = torch.from_numpy(t).to(policy.device)
    x, target = noised(policy, z, e, t)
    return ((policy.unet_output(x, t, policy.encode(prompts)) - target) ** 2).mean()


def prepare(job, prompts, benign, labels):
    """Make job.data, {path: latent (C, h, w)} of the prompts' pictures; no extra tensors."""
    without = next((prompt for prompt in prompts if not prompt.image), None)
    if without is not None:
        raise UserError(f"--prompts: {str(without)!r:.40} has no picture; fine-tuning needs a file "
                        "with the column image")
    policy, paths = job.policy, list(dict.fromkeys(prompt.image for prompt in prompts))
    side = policy.latent_shape(job.args.resolution)[1] * policy.pixels
    pictures = np.stack([square(read_picture(path, "--prompts"), side) for path in paths])
    job.data = dict(zip(paths, to_latents(policy, pictures), strict=True))


def square(picture, side):
    """The middle of a picture uint8 (H, W, 3), (side, side, 3)."""
    height, width, _ = picture.shape
    short = min(height, width)
    left, top = (width - short) // 2, (height - short) // 2
    image = Image.fromarray(picture).crop((left, top, left + short, top + short))
    return np.asarray(image.resize((side, side), Image.LANCZOS))


FINE_TUNE = Edit(
    step, "Modular LoRA, arXiv 2412.00357", weights=r".*attn", prepare=prepare,
    uses=("iterations", "lr", "batch_size", "rank", "resolution", "dtype", "save_every"),
    settings={                          # the embedded world's are not tuned yet
        "embedded": {"iterations": 400, "lr": 1e-3, "batch_size": 16, "rank": 4},
        "stable_diffusion": {           # the paper's
            "iterations": 5000,
            "lr": 1e-4,
            "batch_size": 1,
            "rank": 4,
        },
    })
