"""What a person sees of a training: the run card, previews, the curve, the model card."""
import io
import json
import os

import peers
from checkpoint import write


def run_card(args, policy, guide, trained, prompts, benign, refused, learned, device, dtype, why):
    """Print what train.py is about to do; learned: how many of a picture's steps are learned from."""
    from guide import rows_of
    count = lambda n: f"{n / 1e6:.2f} M" if n >= 1e5 else str(n)
    pictures = args.groups * args.group_size
    rows = pictures * rows_of(guide, args.guidance)
    total = sum(p.numel() for p in policy.unet.parameters())
    weights = sum(p.numel() for p in trained.values())
    reward = args.reward or f"{args.clip_weight:g} clip - {args.nudity_weight:g} max({args.unsafe_labels})"
    if args.gate is not None and not args.reward:
        reward += f", gate {args.gate:g}"
    if args.benign_weight and benign:
        reward += f"; pull of benign prompts to the base {args.benign_weight:g}"
    print(f"model          {args.model}, {policy.prediction_type}; "
          f"trained {count(weights)} of {count(total)} UNet weights ({args.trainable})\n"
          f"device         {device}, {dtype}: {why}\n"
          f"prompts        {len(prompts)} to make safe, {len(benign)} benign; "
          f"{refused} refused for mentioning minors\n"
          f"reward         {reward}\n"
          f"an epoch       {args.groups} prompts x {args.group_size} = {pictures} pictures "
          f"of {args.steps} steps, {args.updates * args.inner_epochs} updates\n"
          f"UNet rows      {rows * args.steps} forward to sample, {rows * learned * args.inner_epochs} "
          + (f"forward and backward to learn, an epoch; a learning call holds {args.train_batch_size} picture-timesteps" if args.keep == "nothing" else
             f"of them backward too, an epoch: sampling keeps {args.keep}, so the only update is on-policy and its ratio 1")
          + (f"; {peers.size()} processes share the batches" if peers.size() > 1 else ""), flush=True)


def save_preview(path, policy, guide, prompts, args, nudity, columns):
    """A grid with fixed prompts and seeds, pixelated where the detector fires."""
    if not args.preview_images:
        return
    from reward import THRESHOLD
    from sample import generate, grid, pixelate, spread
    picked, seeds = spread(prompts, args.preview_images, 2_000_000)
    pictures = generate(policy, guide, picked, seeds, args.steps, args.eta, args.guidance, args.batch_size,
                        args.resolution)
    fires = nudity(pictures)[:, columns].max(1) >= THRESHOLD
    buffer = io.BytesIO()
    grid(pictures if args.no_censor else pixelate(pictures, fires)).save(buffer, "PNG")
    write(path, buffer.getvalue())


def save_curve(path, rows):
    """The reward's parts over the epochs (rows of metrics.jsonl) as a PNG."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    names = [n for n in ("reward", "clip", "nudity", "unsafe") if n in rows[0]]
    figure, axes = plt.subplots(1, len(names), figsize=(3.2 * len(names), 2.6), squeeze=False)
    for axis, name in zip(axes[0], names):
        for prefix, label in (("", "to make safe"), ("benign_", "benign")):
            if prefix + name in rows[0]:
                axis.plot([r["epoch"] for r in rows], [r.get(prefix + name) for r in rows], label=label)
        axis.set(title=name, xlabel="epoch")
    axes[0, 0].legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, bbox_inches="tight", dpi=110)
    plt.close(figure)
    write(path, buffer.getvalue())


def model_card(args, what, tags, last, verdict=""):
    """README.md of a trained folder, with the metadata of the hub: what it is, how to load it, its last figures and its settings."""
    load = {"lora": f'pipe.load_lora_weights("{args.output_dir}")'}.get(
        args.trainable, f'pipe.unet = UNet2DConditionModel.from_pretrained("{args.output_dir}", subfolder="unet")')
    return f"""---
base_model: {args.model}
library_name: diffusers
license: other
tags: [text-to-image, {args.trainable}, {tags}, safety]
---
# {os.path.basename(args.output_dir)}

`{args.model}` {what}

```python
pipe = StableDiffusionPipeline.from_pretrained("{args.model}", safety_checker=None)
{load}
```

{verdict}

Last row of metrics.jsonl: `{json.dumps(last)}`

Settings: `{json.dumps({k: v for k, v in vars(args).items() if v is not None})}`
"""
