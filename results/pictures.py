"""The README's pictures, from committed numbers and from runs that are made where they are absent.

    python results/pictures.py

before_after.png: the same prompts and seeds before and after `python train.py`, in a red frame
where NudeNet fires. curve.png: the training of three seeds, from curves.csv. A file that is there
is left as it is.
"""
import csv
import json
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import matplotlib
import numpy as np

from model import Policy
from plumbing.checkpoints import LORA_FILE
from plumbing.plots import frame
from prompts import cycle_prompts, read
from reward import Nudity, is_flagged, parse_labels
from sample import generate

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SEEDS = (0, 1, 2)
CURVES = os.path.join(ROOT, "results", "curves.csv")
FIELDS = ["reward", "unsafe", "clip", "benign_clip"]
FILES = [("data/unsafe_unseen.csv", "unsafe"), ("data/benign_unseen.csv", "benign")]
COLUMNS = 10


def train_if_absent(folder, *options):
    """The LoRA of a run of train.py's, trained if it is not there."""
    if not os.path.exists(os.path.join(folder, LORA_FILE)):
        command = [sys.executable, "train.py", "--output-dir", folder, *options]
        subprocess.run(command, cwd=ROOT, check=True)
    return folder


def before_after(path):
    """A grid: ten unsafe captions before and after, ten benign ones before and after."""
    run = train_if_absent(os.path.join(ROOT, "out", "shield"))
    with open(os.path.join(run, "args.json"), encoding="utf-8") as file:
        args = SimpleNamespace(**json.load(file))
    policies = {"before": Policy(args.model), "after": Policy(args.model, [(run, 1.)])}
    nudity, labels = Nudity(), parse_labels(args.unsafe_labels)
    heights = [1, 1, .48, 1, 1, .48]                    # the third and last row are captions
    figure, axes = plt.subplots(len(heights), COLUMNS, figsize=(COLUMNS * 1.1, 5.7),
                                height_ratios=heights)
    for axis in axes.flat:
        axis.axis("off")
    for block, (file, kind) in enumerate(FILES):
        prompts, _ = read(os.path.join(ROOT, file))
        texts, seeds = cycle_prompts(prompts[:COLUMNS], COLUMNS, seed=3_000_000)
        for row, (name, policy) in enumerate(policies.items(), 3 * block):
            pictures = generate(policy, texts, seeds, args)
            pictures = frame(pictures, is_flagged(nudity(pictures), labels), width=3)
            for axis, picture in zip(axes[row], pictures, strict=True):
                axis.imshow(picture, interpolation="nearest")
            axes[row, 0].text(-.06, .5, f"{kind},\n{name}", fontsize=8, ha="right", va="center",
                              transform=axes[row, 0].transAxes)
        for axis, text in zip(axes[3 * block + 2], texts, strict=True):
            axis.text(.5, .95, textwrap.fill(text, 15), fontsize=6.5, ha="center", va="top")
    figure.subplots_adjust(left=.065, right=.997, top=.997, bottom=.003, wspace=.05, hspace=.05)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def write_curves():
    """curves.csv: what each seed's epochs gave, from runs that are trained if they are absent."""
    with open(CURVES, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["seed", "epoch", *FIELDS])
        for seed in SEEDS:
            folder = train_if_absent(os.path.join(ROOT, "out", f"seed{seed}"), "--seed", str(seed))
            with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as metrics:
                for row in map(json.loads, metrics):
                    table.writerow([seed, row["epoch"], *(f"{row[name]:.4f}" for name in FIELDS)])


def curve(path):
    """What the seeds' training pictures were like, epoch by epoch: mean and range."""
    if not os.path.exists(CURVES):
        write_curves()
    with open(CURVES, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    epochs = sorted({int(row["epoch"]) for row in rows})
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 2.5))
    for axis, parts in ((axes[0], [("unsafe", "unsafe share of pictures to make safe")]),
                        (axes[1], [("clip", "CLIP, prompts to make safe"),
                                   ("benign_clip", "CLIP, benign prompts")])):
        for name, label in parts:
            values = np.array([[float(row[name]) for row in rows if int(row["epoch"]) == epoch]
                               for epoch in epochs])                        # (epochs, seeds)
            line, = axis.plot(epochs, values.mean(1), label=label)
            axis.fill_between(epochs, values.min(1), values.max(1), alpha=.25, lw=0,
                              color=line.get_color())
        axis.set(xlabel="epoch", ylim=(0, 1 if axis is axes[0] else None))
        axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, bbox_inches="tight", dpi=130)
    plt.close(figure)


def main():
    for name, draw in (("before_after.png", before_after), ("curve.png", curve)):
        path = os.path.join(ROOT, "results", name)
        if not os.path.exists(path):
            draw(path)
            print(f"drew {path}")


if __name__ == "__main__":
    main()
