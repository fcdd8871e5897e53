"""Runs side by side on the validation prompts, on which settings are chosen: a line each.

    python results/validate.py out/a out/b              # folders of train.py's, embedded world
    python results/validate.py --pictures 512 out/a

Shares are of pictures; "open" leaves the hand to the model, "explicit" asks for an unsafe one.
Changes are to the base, of the same prompts and seeds.
"""
import argparse
import os
import sys
from types import SimpleNamespace

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import numpy as np

from judging.judges import load_judge
from model import Policy
from plumbing.worlds import read_recipe, read_world
from prompts import cycle_prompts, read
from reward import EXPOSED, LABELS, THRESHOLD, ClipScore, Nudity, parse_labels, worst_label
from sample import generate

SEED = 6_000_000


def look(policy, judges, path, count, category=None, labels=()):
    """What is seen of a file's pictures: {what: (N,)}."""
    nudity, clip, judge = judges
    prompts, _ = read(path)
    if category is not None:
        prompts = [p for p in prompts if ("explicit" in p.category) == category]
    texts, seeds = cycle_prompts(prompts, count, SEED)
    settings = SimpleNamespace(**read_recipe(policy.world.recipe))
    pictures = generate(policy, texts, seeds, settings)
    scores = nudity(pictures)
    return {"unsafe": worst_label(scores, labels) >= THRESHOLD,
            "exposed": scores[:, [LABELS.index(label) for label in EXPOSED]] >= THRESHOLD,
            "clip": clip(pictures, [p.safe_text for p in texts]),
            **judge(pictures, texts)}


def columns(seen, base):
    """The numbers of a run, {title: text}."""
    def share(file, what):
        return f"{100 * np.nanmean(seen[file][what]):5.1f}"
    row = {}
    for file in ("open", "explicit", "never"):
        row[f"{file} unsafe"] = share(file, "unsafe")
        row[f"{file} named"] = share(file, "named")
    row["outlined"] = share("open", "safe_hand")
    row["benign named"] = share("benign", "named")
    row["hand"] = share("benign", "hand")
    row["benign outlined"] = share("benign", "safe_hand")
    change = seen["benign"]["clip"].mean() / base["benign"]["clip"].mean() - 1
    row["CLIP"] = f"{100 * change:+5.2f}"
    rises = np.mean([seen[file]["exposed"].mean(0) - base[file]["exposed"].mean(0)
                     for file in seen], 0)
    worst = int(np.argmax(rises))
    row["label"] = f"{100 * rises[worst]:+.1f} {EXPOSED[worst]}"
    return row


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--prompts", default="unsafe_train", help="whose validation files")
    parser.add_argument("--unsafe-labels", default="strict")
    args = parser.parse_args()
    world = read_world(args.model)
    judges = (Nudity(), ClipScore(world.clip), load_judge(world.judge, safe_hand=world.safe))
    labels = parse_labels(args.unsafe_labels)
    entry = next(one for one in world.training_files if args.prompts in one.prompts)
    trained, never, benign = entry.validation
    base = None
    for run in [None, *args.runs]:
        policy = Policy(args.model, [(run, 1.)] if run else [])
        seen = {"open": look(policy, judges, trained, args.pictures, False, labels),
                "explicit": look(policy, judges, trained, args.pictures, True, labels),
                "never": look(policy, judges, never, args.pictures, None, labels),
                "benign": look(policy, judges, benign, args.pictures, None, labels)}
        if base is None:
            base = seen
            print(" | ".join(["run", *columns(seen, base)]))
        print(" | ".join([os.path.basename(run or "base"), *columns(seen, base).values()]),
              flush=True)


if __name__ == "__main__":
    main()
