"""The README's pictures, from committed numbers and from runs that are made where they are absent.

    python results/pictures.py

before_after.png: the same prompts and seeds before and after `python train.py`, in a red frame
where NudeNet fires; of each prompt file the first that the base draws unsafe and, where nothing
is said, without an outline. face_female.png: where a label that was never rewarded rises.
curve.png: the training of five seeds, from curves.csv. strip.png: two prompts under every system,
by the checkpoints that `python evaluate.py --systems rivals/systems.csv` made. A file that is there
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

from judging.judges import load_judge
from judging.rows import load_system, with_words
from judging.systems import read_systems
from model import Policy
from plumbing.checkpoints import LORA_FILE
from plumbing.plots import frame
from plumbing.worlds import read_recipe, read_world
from prompts import Prompt, read
from reward import THRESHOLD, Nudity, parse_labels, worst_label
from sample import choose_method, generate, generate_with_blocking
from tiny.drawings import SIZES

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SEEDS = (0, 1, 2, 3, 4)
CURVES = os.path.join(ROOT, "results", "curves.csv")
FIELDS = ["reward", "unsafe", "clip", "watched_unsafe", "watched_named", "watched_benign_clip"]
EXPLICIT, BENIGN = "data/unsafe_explicit.csv", "data/benign_unseen.csv"
GROUPS = [                              # (prompt file, its heading, columns of the grid)
    ("data/unsafe_unseen.csv", "unseen combinations", 4),
    (EXPLICIT, "the unsafe hand asked for", 2),
    ("data/unsafe_never.csv", "never trained on", 2),
]
SEED, SCALE = 7_000_000, 2
STRIP_WIDTH = 12                        # systems side by side


def train_if_absent(folder, *options):
    """The folder of a run of train.py's, which is trained if it has no weights."""
    if not os.path.exists(os.path.join(folder, LORA_FILE)):
        command = [sys.executable, "train.py", "--output-dir", folder, *options]
        subprocess.run(command, cwd=ROOT, check=True)
    return folder


def trips(pictures, nudity, labels):
    return worst_label(nudity(pictures), labels) >= THRESHOLD


def name_of(prompt):
    """The emoji that an unsafe prompt names: "a small peach on a red background" -> "peach"."""
    return " ".join(word for word in prompt.safe_text.split(" on a ")[0].split()
                    if word not in ("a", "an", *SIZES))


def columns(policy, nudity, labels, args):
    """The grid's prompts, each with the seed of its picture: (heading, prompt, seed).

    Of each file the first that the base draws unsafe and not outlined (by the judge), each of
    another emoji than those before.
    """
    world = read_world(args.model)
    judge = load_judge(world.judge, safe_hand=world.safe)
    chosen, names = [], set()
    for file, heading, count in GROUPS:
        prompts, _ = read(os.path.join(ROOT, file))
        seeds = list(range(SEED, SEED + len(prompts)))
        pictures = generate(policy, prompts, seeds, args)
        unsafe = trips(pictures, nudity, labels) & (judge(pictures, prompts)["safe_hand"] != 1)
        found = 0
        for prompt, seed, is_unsafe in zip(prompts, seeds, unsafe, strict=True):
            name = name_of(prompt)
            if is_unsafe and name not in names and found < count:
                names.add(name)
                chosen.append((heading, prompt, seed))
                found += 1
    return chosen


def before_after(path):
    """A grid: eight unsafe captions before and after, in a red frame where the detector fires."""
    args, before, after = the_run()
    nudity, labels = Nudity(), parse_labels(args.unsafe_labels)
    chosen = columns(before, nudity, labels, args)
    prompts, seeds = [prompt for _, prompt, _ in chosen], [seed for _, _, seed in chosen]
    rows = {}
    for name, policy in (("before", before), ("after", after)):
        pictures = generate(policy, prompts, seeds, args)
        rows[name] = pictures, trips(pictures, nudity, labels)
    headings = [heading for heading, _, _ in chosen]
    first = {headings.index(heading): heading for heading in dict.fromkeys(headings)}
    draw_grid(path, rows, prompts, first)


def face_female(path):
    """A grid: where FACE_FEMALE rises, and what the base draws if it is asked for an outline.

    The first explicit captions, each of another emoji, whose picture after training has the label;
    in a red frame wherever it is.
    """
    args, before, after = the_run()
    nudity, safe = Nudity(), read_world(args.model).safe
    prompts, _ = read(os.path.join(ROOT, EXPLICIT))
    seeds = list(range(SEED, SEED + len(prompts)))
    outlined = [Prompt(f"an {safe} {prompt.safe_text.removeprefix('a ')}") for prompt in prompts]
    pictures = {"before": generate(before, prompts, seeds, args),
                "after": generate(after, prompts, seeds, args),
                f"before, {safe}": generate(before, outlined, seeds, args)}
    shown = {name: trips(part, nudity, ["FACE_FEMALE"]) for name, part in pictures.items()}
    for name, part in shown.items():
        print(f"{name}: FACE_FEMALE on {100 * part.mean():.1f} % of {len(part)} pictures")
    chosen = {name_of(prompts[i]): i for i in reversed(np.flatnonzero(shown["after"]))}
    chosen = sorted(chosen.values())[:8]                    # the first of each emoji
    draw_grid(path, {name: (part[chosen], shown[name][chosen]) for name, part in pictures.items()},
              [prompts[i] for i in chosen])


def strip(path):
    """An unsafe prompt and a benign one, a seed each, under every system of the table.

    In a red frame where the detector fires, black where a blocker stopped it; below: its row.
    """
    args = SimpleNamespace(model="tiny", **read_recipe("embedded"))
    systems, _ = read_systems(os.path.join(ROOT, "rivals", "systems.csv"))
    systems = [system for system in with_words(systems, None, read_world("tiny"))
               if system.seed == 0]
    base, nudity, labels = Policy("tiny"), Nudity(), parse_labels("strict")
    _, unsafe, seed = columns(base, nudity, labels, args)[0]
    prompts, seeds = [unsafe, read(os.path.join(ROOT, BENIGN))[0][0]], [seed, SEED]
    drawn = {}
    for system in systems:
        policy = load_system(system, "tiny", "cpu", "fp32")
        pictures, _ = generate_with_blocking(policy, choose_method(system.method), prompts, seeds,
                                             args)
        drawn[system.name] = pictures, trips(pictures, nudity, labels)
    names = list(drawn)
    blocks = [names[i:i + STRIP_WIDTH] for i in range(0, len(names), STRIP_WIDTH)]
    figure, axes = plt.subplots(3 * len(blocks), STRIP_WIDTH, squeeze=False,
                                height_ratios=[1, 1, .35] * len(blocks),
                                figsize=(STRIP_WIDTH * 1.1, len(blocks) * 2.6))
    for axis in axes.flat:
        axis.axis("off")
    for block, some in enumerate(blocks):
        for column, name in enumerate(some):
            pictures, fires = drawn[name]
            large = frame(pictures.repeat(SCALE, 1).repeat(SCALE, 2), fires, width=3 * SCALE)
            for row, picture in enumerate(large):
                axes[3 * block + row, column].imshow(picture, interpolation="bicubic")
            axes[3 * block + 2, column].text(.5, 1, textwrap.fill(name, 14), fontsize=8,
                                             ha="center", va="top")
    figure.subplots_adjust(left=.003, right=.997, bottom=.003, top=.997, wspace=.05, hspace=.05)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def the_run():
    """(options, base, trained policy) of `python train.py`, which is run if it was not."""
    run = train_if_absent(os.path.join(ROOT, "out", "shield"))
    with open(os.path.join(run, "args.json"), encoding="utf-8") as file:
        args = SimpleNamespace(**json.load(file))
    return args, Policy(args.model), Policy(args.model, [(run, 1.)])


def draw_grid(path, rows, captions, headings=None):
    """A PNG of rows {name: (pictures (N, h, w, 3), which (N,) get a red frame)}, captions below.

    headings: {column: text above it}.
    """
    figure, axes = plt.subplots(len(rows) + 1, len(captions), height_ratios=[*[1] * len(rows), .42],
                                figsize=(len(captions) * 1.3, .7 + 1.4 * len(rows)))
    for axis in axes.flat:
        axis.axis("off")
    for row, (name, (pictures, fires)) in enumerate(rows.items()):
        large = pictures.repeat(SCALE, 1).repeat(SCALE, 2)
        for axis, picture in zip(axes[row], frame(large, fires, width=3 * SCALE), strict=True):
            axis.imshow(picture, interpolation="bicubic")
        axes[row, 0].text(-.06, .5, name, fontsize=9, ha="right", va="center", rotation=90,
                          transform=axes[row, 0].transAxes)
    for axis, caption in zip(axes[-1], captions, strict=True):
        axis.text(.5, .97, textwrap.fill(str(caption), 19), fontsize=7, ha="center", va="top")
    for column, heading in (headings or {}).items():
        axes[0, column].set_title(heading, fontsize=8, loc="left", pad=3)
    figure.subplots_adjust(left=.22 / len(captions), right=.997, bottom=.003,
                           top=.94 if headings else .99, wspace=.05, hspace=.05)
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
                    table.writerow([seed, row["epoch"], *(f"{row[name]:.4f}" if name in row else ""
                                                          for name in FIELDS)])


def curve(path):
    """What the seeds' training pictures and the watched ones were like: mean and range."""
    if not os.path.exists(CURVES):
        write_curves()
    with open(CURVES, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 2.5))
    for axis, parts in ((axes[0], [("unsafe", "unsafe, training prompts"),
                                   ("watched_unsafe", "unsafe, validation prompts"),
                                   ("watched_named", "named right, validation prompts")]),
                        (axes[1], [("clip", "CLIP, training prompts to make safe"),
                                   ("watched_benign_clip", "CLIP, benign validation prompts")])):
        for name, label in parts:
            has_it = [row for row in rows if row[name]]
            epochs = sorted({int(row["epoch"]) for row in has_it})
            values = np.array([[float(row[name]) for row in has_it if int(row["epoch"]) == epoch]
                               for epoch in epochs])                        # (epochs, seeds)
            style = "o-" if name.startswith("watched") else "-"
            line, = axis.plot(epochs, values.mean(1), style, markersize=3, label=label)
            axis.fill_between(epochs, values.min(1), values.max(1), alpha=.25, lw=0,
                              color=line.get_color())
        axis.set(xlabel="epoch", ylim=(0, 1.02 if axis is axes[0] else None))
        axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, bbox_inches="tight", dpi=130)
    plt.close(figure)


def main():
    drawn_by = {"before_after.png": before_after, "face_female.png": face_female,
                "curve.png": curve, "strip.png": strip}
    for name, draw in drawn_by.items():
        path = os.path.join(ROOT, "results", name)
        if not os.path.exists(path):
            draw(path)
            print(f"drew {path}")


if __name__ == "__main__":
    main()
