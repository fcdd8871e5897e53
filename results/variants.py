"""A table and a figure of variants of the training: means and ranges over seeds, on validation.

    for weight in 0 0.15 0.3 0.6; do for seed in 0 1 2; do      # a name with . first would hide
        python train.py --held-out --clip-weight $weight --seed $seed \\
            --output-dir "out/clip_weight/$weight seed $seed"
    done; done
    python evaluate.py --checkpoint out/clip_weight/* --pictures 256 \\
        --prompts data/unsafe_validation.csv data/unsafe_never_validation.csv \\
        --benign data/benign_validation.csv --output-dir out/clip_weight_table
    python results/variants.py clip_weight out/clip_weight_table    # -> clip_weight.json, .md, .png

    for seed in 0 1 2; do                               # evaluated likewise -> loss.json, .md, .png
        python train.py --held-out --seed $seed --output-dir "out/loss/ddpo seed $seed"
        python train.py --held-out --seed $seed --output-dir "out/loss/elbo seed $seed" \\
            --recipe elbo
    done

A run's folder is called after its variant and its seed. Without a folder the page and the figure
are made anew from the numbers.
"""
import argparse
import json
import os
import re
import sys
from collections import defaultdict

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

from results.seeds import spread

TITLES = {"clip_weight": "How much CLIP: the reward's weight of it (`--clip-weight`)",
          "loss": "Likelihood of the trajectory (DDPO) or of the finished picture (elbo)"}
RUN = re.compile(r"(.+) seed \d+")
COLUMNS = [                             # (title, file, metric, whether the figure shows it)
    ("unsafe, unseen and explicit", "unsafe_validation.csv", "unsafe.strict", True),
    ("unsafe, never trained on", "unsafe_never_validation.csv", "unsafe.strict", True),
    ("named right, the same", "unsafe_validation.csv", "named", True),
    ("named right, never trained on", "unsafe_never_validation.csv", "named", False),
    ("benign: named right", "benign_validation.csv", "named", False),
    ("benign CLIP, × 100", "benign_validation.csv", "clip", True),
]


def keep(folder, path):
    """Write the numbers of an evaluation that the table needs to `path`."""
    with open(os.path.join(folder, "results.json"), encoding="utf-8") as file:
        results = json.load(file)
    rows = {row: {title: results["table"][name][row][metric]["value"]
                  for title, name, metric, _ in COLUMNS}
            for row in next(iter(results["table"].values()))}
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"commit": results["settings"]["commit"], "rows": rows}, file, indent=1)
        file.write("\n")


def variants_of(rows):
    """{variant: {column: its seeds' values}}, the base first, of {row: {column: value}}."""
    variants = defaultdict(lambda: defaultdict(list))
    for row, values in rows.items():
        found = RUN.fullmatch(row)
        for column, value in values.items():
            variants[found[1] if found else row][column].append(value)
    return variants


def as_markdown(name, kept):
    titles = [title for title, *_ in COLUMNS]
    lines = [f"# {TITLES.get(name, name)}", "",
             "Mean (range) over the seeds of each variant, in percent; `results/variants.py` has "
             f"the commands; evaluated at commit {kept['commit']} on the validation files.", "",
             "| | seeds | " + " | ".join(titles) + " |", "|" + "---|" * (len(titles) + 2)]
    for variant, columns in variants_of(kept["rows"]).items():
        seeds = len(columns[titles[0]])
        lines.append(f"| {variant} | {seeds if seeds > 1 else ''} | "
                     + " | ".join(spread(columns[title]) for title in titles) + " |")
    return "\n".join([*lines, "", f"![The same as a figure]({name}.png)", ""])


def draw(kept, path):
    """Each column that the figure shows: every seed a dot, the mean a line; dashed: the base."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    variants = variants_of(kept["rows"])
    names = [name for name in variants if name != "base"]
    shown = [title for title, *_, is_shown in COLUMNS if is_shown]
    figure, axes = plt.subplots(1, len(shown), figsize=(3 * len(shown), 2.8), squeeze=False)
    for axis, title in zip(axes[0], shown, strict=True):
        values = [[100 * value for value in variants[name][title]] for name in names]
        axis.axhline(100 * variants["base"][title][0], color="0.6", linestyle="--", linewidth=1)
        axis.plot([np.mean(some) for some in values], color="C0")
        for i, some in enumerate(values):
            axis.plot([i] * len(some), some, "o", color="C0", markersize=3)
        axis.set_xticks(range(len(names)), names)
        axis.set_title(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main():
    p = argparse.ArgumentParser(description="A table of variants, from an evaluation.")
    p.add_argument("name", help="of the files, beside this one")
    p.add_argument("folder", nargs="?", help="where evaluate.py wrote results.json")
    args = p.parse_args()
    path = os.path.join(HERE, args.name)
    if args.folder:
        keep(args.folder, f"{path}.json")
    with open(f"{path}.json", encoding="utf-8") as file:
        kept = json.load(file)
    with open(f"{path}.md", "w", encoding="utf-8") as file:
        file.write(as_markdown(args.name, kept))
    draw(kept, f"{path}.png")


if __name__ == "__main__":
    main()
