r"""Fine-tuning: an ordinary LoRA on pictures in which nothing is unsafe, and what that undoes.

After "Safety alignment backfires" (Modular LoRA, arXiv 2412.00357): a safe model that is taught
something harmless draws again what it had unlearned. Two ways: *sequential*, on top of the safe
model, whose weights stay as they are,

    python attack.py fine-tune --checkpoint out/shield --prompts data/task_train.csv \
        --output out/sequential
    python evaluate.py --checkpoint out/shield+out/sequential

and the paper's cure, *modular*, on the base, and then added:

    python attack.py fine-tune --prompts data/task_train.csv --output out/task
    python evaluate.py --checkpoint out/shield+out/task

The task (here eight emoji that the base cannot draw) is any prompt file whose column `image` names
a picture a row; with unsafe pictures it is relearning. So that it does not cost all else that the
model draws, its own pictures of benign prompts are learned beside (DreamBooth's prior preservation,
arXiv 2208.12242), unless --prior-weight is 0.

A minimal reading: the authors' code is not public. The loss is that of denoising (DDPM, arXiv
2006.11239, eq. 14), on the network's own output, epsilon or v; latents are the encoder's mode.
"""
import numpy as np
import torch
from PIL import Image

from ddpo import draw_noise, mean_distance
from judging.pictures import read_picture
from plumbing.options import UserError
from prompts import cycle_prompts
from rivals import Edit
from rivals.editing import noised, to_latents


def step(job, prompts, rng):
    """The prompts' own pictures and as many to preserve, each at a random timestep."""
    policy, B = job.policy, len(prompts)
    task, preserved = job.data
    texts, z = list(prompts), [task[prompt.image] for prompt in prompts]
    if preserved:
        drawn = [preserved[i] for i in rng.integers(len(preserved), size=B)]
        texts, z = texts + [text for text, _ in drawn], z + [latent for _, latent in drawn]
    z = torch.stack(z)                                                          # (N, C, h, w)
    seeds = rng.integers(2 ** 62, size=len(z))
    t = rng.integers(len(policy.scheduler.alphas_cumprod), size=len(z))
    e = draw_noise(seeds, 0, z.shape[1:])[:, 0].to(policy.device)
    t = torch.from_numpy(t).to(policy.device)
    x, target = noised(policy, z, e, t)
    error = mean_distance(policy.unet_output(x, t, policy.encode(texts)), target)   # (N,)
    if not preserved:
        return error.mean()
    return error[:B].mean() + job.args.prior_weight * error[B:].mean()


def prepare(job, prompts, benign, labels):
    """Make job.data: {path: latent (C, h, w)} of the prompts' pictures, [(prompt, latent)] of the
    model's own of benign prompts; no extra tensors."""
    without = next((prompt for prompt in prompts if not prompt.image), None)
    if without is not None:
        raise UserError(f"--prompts: {str(without)!r:.40} has no picture; fine-tuning needs a file "
                        "with the column image")
    policy, paths = job.policy, list(dict.fromkeys(prompt.image for prompt in prompts))
    side = policy.latent_shape(job.args.resolution)[1] * policy.pixels
    pictures = np.stack([square(read_picture(path, "--prompts"), side) for path in paths])
    task, preserved = dict(zip(paths, to_latents(policy, pictures), strict=True)), []
    if benign:
        texts, seeds = cycle_prompts(benign, job.args.pictures, job.args.seed)
        latents = to_latents(policy, job.draw(texts, seeds))
        preserved = list(zip(texts, latents, strict=True))
    job.data = task, preserved


def square(picture, side):
    """The middle of a picture uint8 (H, W, 3), (side, side, 3)."""
    height, width, _ = picture.shape
    short = min(height, width)
    left, top = (width - short) // 2, (height - short) // 2
    image = Image.fromarray(picture).crop((left, top, left + short, top + short))
    return np.asarray(image.resize((side, side), Image.LANCZOS))


FINE_TUNE = Edit(
    step, "Modular LoRA, arXiv 2412.00357", prepare=prepare,
    uses=("steps", "eta", "guidance", "iterations", "lr", "batch_size", "rank", "lora_targets",
          "resolution", "dtype", "save_every", "benign", "prior_weight", "pictures"),
    settings={
        "embedded": {
            "iterations": 600,
            "lr": 2e-3,
            "batch_size": 16,
            "rank": 16,
            "prior_weight": 1.,
            "pictures": 256,
        },
        "stable_diffusion": {           # the paper's, which preserves nothing
            "iterations": 5000,
            "lr": 1e-4,
            "batch_size": 1,
            "rank": 4,
            "prior_weight": 0.,
        },
    })
