"""ddpo-pytorch's own training loop beside ours, on one neutral reward: how red a picture is.

    git clone https://github.com/kvablack/ddpo-pytorch ../ddpo-pytorch
    pip install absl-py ml_collections inflect
    for seed in 0 1 2; do
        python results/reference.py --run ../ddpo-pytorch --seed $seed
        python results/reference.py --run ours --seed $seed
    done                                                # -> out/redness/NAME seed N.jsonl
    python results/reference.py out/redness             # -> results/redness.json, .md, .png

Their scripts/train.py runs as it is, on tiny/, with the settings that are ours here. What it
imports from the diffusers of its time (0.17.1, which can't read tiny/'s autoencoder) has a stand-in
of today's: the LoRA is peft's, as in TRL's copy of it, and nothing is sent to wandb. Without a
folder the page and the figure are made anew from the numbers.
"""
import argparse
import glob
import importlib.machinery
import json
import os
import runpy
import sys
import types

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)

from results.seeds import spread

FOLDER = "out/redness"
PROMPT = "a large bus on a blue background"
EPOCHS, PICTURES, BATCH, RANK = 60, 64, 32, 4           # a batch is one of an epoch's two updates
STEPS, GUIDANCE, RATE, CLIP_RANGE = 5, 2., 3e-3, 1.6e-3     # Stable Diffusion's 1e-4 for tiny/'s
MEMORY, MIN_COUNT = 32, 16                              # latents, which have 1024 numbers
WINDOW = 10                                             # epochs of a row of the table


# ---- ours ----------------------------------------------------------------------------------------

def run_ours(seed, path):
    """Train by train.py with their objective alone; write each epoch's mean reward to `path`."""
    import train
    folder = os.path.splitext(path)[0]
    train.main(train.parse_args([
        "--recipe", "reference", "--reward", f"{ROOT}/bench.py:redness", "--prompts", PROMPT,
        "--held-out", "--benign-share", "0", "--dtype", "fp32", "--seed", str(seed),
        "--epochs", str(EPOCHS), "--groups", str(PICTURES), "--batch-size", str(BATCH),
        "--updates", str(PICTURES // BATCH), "--rank", str(RANK), "--steps", str(STEPS),
        "--guidance", str(GUIDANCE), "--lr", str(RATE), "--clip-range", str(CLIP_RANGE),
        "--save-every", str(EPOCHS), "--output-dir", folder]))
    with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row["reward"]) + "\n" for row in rows if "reward" in row)


# ---- theirs --------------------------------------------------------------------------------------

def stand_in_peft():
    """Stand-ins for the LoRA of diffusers 0.17: its classes are gone, peft has its layers."""
    import diffusers
    import diffusers.models.attention_processor as attention_processor
    from peft import LoraConfig
    from torch import nn
    networks = []

    def set_attn_processor(unet, processors):
        unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian",
                                    target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        networks.append(unet)

    class AttnProcsLayers(nn.Module):
        def __init__(self, processors):
            super().__init__()
            self.trained = nn.ParameterList(p for p in networks[-1].parameters() if p.requires_grad)

    attention_processor.LoRAAttnProcessor = lambda **sizes: None
    diffusers.UNet2DConditionModel.set_attn_processor = set_attn_processor
    diffusers.loaders.AttnProcsLayers = AttnProcsLayers


def run_theirs(checkout, seed, path):
    """Run scripts/train.py of a checkout of ddpo-pytorch; its mean rewards go to `path`."""
    import accelerate
    import diffusers
    import torch
    from diffusers.utils.torch_utils import randn_tensor

    stand_in_peft()
    diffusers.utils.randn_tensor = randn_tensor
    wandb = sys.modules["wandb"] = types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    wandb.Image = lambda *args, **kwargs: None

    class Accelerator(accelerate.Accelerator):
        def __init__(self, log_with, **kwargs):
            super().__init__(**kwargs)

        def init_trackers(self, **kwargs):
            open(path, "w", encoding="utf-8").close()

        def log(self, values, step):
            if "reward_mean" in values:
                with open(path, "a", encoding="utf-8") as file:
                    file.write(f"{values['reward_mean']}\n")

        def save_state(self):
            pass
    accelerate.Accelerator = Accelerator

    sys.path.insert(0, checkout)
    import ddpo_pytorch.prompts
    import ddpo_pytorch.rewards

    from bench import redness
    ddpo_pytorch.prompts.one = lambda: (PROMPT, {})
    ddpo_pytorch.rewards.redness = lambda: lambda pictures, prompts, _: (       # of (N, 3, H, W)
        torch.from_numpy(redness(255 * pictures.permute(0, 2, 3, 1).cpu(), prompts)["reward"]), {})
    settings = {
        "pretrained.model": os.path.join(ROOT, "tiny"), "pretrained.revision": "",
        "mixed_precision": "no", "seed": seed, "num_epochs": EPOCHS, "logdir": FOLDER,
        "sample.num_steps": STEPS, "sample.guidance_scale": GUIDANCE, "sample.batch_size": BATCH,
        "sample.num_batches_per_epoch": PICTURES // BATCH, "train.batch_size": BATCH,
        "train.learning_rate": RATE, "train.clip_range": CLIP_RANGE, "prompt_fn": "one",
        "reward_fn": "redness", "per_prompt_stat_tracking.buffer_size": MEMORY,
        "per_prompt_stat_tracking.min_count": MIN_COUNT}
    sys.argv = ["train.py", f"--config={checkout}/config/base.py",
                *(f"--config.{name}={value}" for name, value in settings.items())]
    runpy.run_path(os.path.join(checkout, "scripts", "train.py"), run_name="__main__")


# ---- the page ------------------------------------------------------------------------------------

def read_curves(folder):
    """{"theirs seed 0": [mean reward of each epoch]} of the files in a folder."""
    curves = {}
    for path in sorted(glob.glob(os.path.join(folder, "* seed *.jsonl"))):
        with open(path, encoding="utf-8") as file:
            name = os.path.splitext(os.path.basename(path))[0]
            curves[name] = [round(float(line), 5) for line in file]
    return curves


def sides(curves):
    """{"ours", "theirs": (seeds, epochs)}."""
    return {side: np.array([curve for name, curve in curves.items()
                            if name.startswith(f"{side} seed")])
            for side in ("ours", "theirs")}


def as_markdown(kept):
    curves = sides(kept["curves"])
    lines = [
        "# DDPO beside ddpo-pytorch's own loop", "",
        f"Mean redness of an epoch's {PICTURES} pictures, in percent (red over the mean of green "
        f"and blue, -100 to 100): mean (range) over the seeds of each side. `results/reference.py` "
        f"has the commands and what stands in for the diffusers of 2023. tiny/ in fp32 on a CPU, "
        f"{STEPS} steps, all learned from, guidance {GUIDANCE:g}, LoRA rank {RANK}, learning rate "
        f"{RATE:g}, clip range {CLIP_RANGE:g}, {PICTURES // BATCH} updates an epoch, no pull; at "
        f"commit {kept['commit']}.", "",
        "| epochs | ours | theirs |", "|---|---|---|"]
    for last in range(WINDOW, EPOCHS + 1, WINDOW):
        cells = [spread(curve[:, last - WINDOW:last].mean(1)) for curve in curves.values()]
        lines.append(f"| {last - WINDOW + 1} to {last} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "![The same as a figure](redness.png)", ""])


def draw(kept, path):
    """Both sides' curves, smoothed over five epochs: each seed a line."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(5, 3))
    for color, (side, curves) in zip(("C0", "C1"), sides(kept["curves"]).items(), strict=True):
        for i, curve in enumerate(100 * curves):
            smooth = np.convolve(curve, np.ones(5) / 5, "valid")
            axis.plot(np.arange(len(smooth)) + 3, smooth, color=color, linewidth=1,
                      label=None if i else side)
    axis.set_xlabel("epoch")
    axis.set_ylabel("redness, %")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main():
    p = argparse.ArgumentParser(description="ddpo-pytorch's own loop beside ours.")
    p.add_argument("folder", nargs="?", help="where --run wrote its files")
    p.add_argument("--run", help="ours, or a checkout of ddpo-pytorch: train, write its rewards")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    if args.run:
        os.makedirs(FOLDER, exist_ok=True)
        side = "ours" if args.run == "ours" else "theirs"
        path = os.path.abspath(f"{FOLDER}/{side} seed {args.seed}.jsonl")
        return run_ours(args.seed, path) if side == "ours" else run_theirs(
            os.path.abspath(args.run), args.seed, path)
    path = os.path.join(HERE, "redness")
    if args.folder:
        from judging.setup import commit
        with open(f"{path}.json", "w", encoding="utf-8") as file:
            json.dump({"commit": commit(), "curves": read_curves(args.folder)}, file, indent=1)
            file.write("\n")
    with open(f"{path}.json", encoding="utf-8") as file:
        kept = json.load(file)
    with open(f"{path}.md", "w", encoding="utf-8") as file:
        file.write(as_markdown(kept))
    draw(kept, f"{path}.png")


if __name__ == "__main__":
    main()
