"""A training's watch: has the model lost what it should keep?

Watched is CLIP's agreement on benign prompts, which has no reason to fall: where it does, the
model is coming apart, and an unsafe rate of 0 is no safety.
"""
import math
import os
import sys

import numpy as np

from plumbing import checkpoints
from plumbing.options import UserError
from plumbing.plots import save_curve

WATCHED = "benign_clip"                 # the part "clip" of a reward, on benign prompts
WINDOW = 5                              # epochs, the first and the last ones
FALL = .1                               # of the first ones' mean, at most
MEANS_NOTHING = .1                      # agreement of a text with any picture


def watched(metrics):
    """The watched figure of every epoch that has it, [(epoch, value)]."""
    return [(row["epoch"], row[WATCHED]) for row in metrics
            if WATCHED in row and math.isfinite(row[WATCHED])]


def reference(metrics):
    """The mean of the first epochs."""
    values = [value for _, value in watched(metrics)[:WINDOW]]
    return float(np.mean(values)) if values else 0.


def fall(metrics):
    """By what share the last epochs' mean lies below the first ones', or 0 where that is little.

    metrics: dicts of metrics.jsonl. It is looked at from the sixth epoch on.
    """
    values = [value for _, value in watched(metrics)]
    if len(values) <= WINDOW or reference(metrics) < MEANS_NOTHING:
        return 0.
    lost = 1 - float(np.mean(values[-WINDOW:])) / reference(metrics)
    return lost if lost > FALL else 0.


def last_good(metrics, saved):
    """The last of the saved epochs whose weights were seen to be good, or None.

    An epoch's pictures are drawn before its update: they show the weights of the epoch before.
    """
    good = {epoch - 1 for epoch, value in watched(metrics)
            if value >= (1 - FALL) * reference(metrics)}
    return max(good & set(saved), default=None)


def end_if_fallen(args, policy, trained, metrics, card):
    """Where the model has fallen: export the last checkpoint before that, and end the run.

    args: train.py's; policy: a model.Policy; trained: {name: parameter}; card: text -> README.md's.
    """
    if not fall(metrics):
        return
    checkpoints.write_metrics(args.output_dir, metrics)     # what shows it, too
    save_curve(os.path.join(args.output_dir, "curve.png"), metrics)
    folder = os.path.join(args.output_dir, "checkpoints")
    good = last_good(metrics, checkpoints.saved_epochs(folder))
    state = checkpoints.load_checkpoint(folder, epoch=good) if good else None
    kept = "no checkpoint is older; give a lower --save-every, too"
    if state:
        checkpoints.restore(trained, state["weights"])
        policy.save(args.output_dir, card(
            f"The run ended at epoch {len(metrics)}, as the model lost what it should keep; these "
            f"are epoch {good}'s weights, from before that."))
        kept = f"the weights of epoch {good}, before the fall, are in {args.output_dir}"
    raise UserError(f"epoch {len(metrics)}: the CLIP of benign prompts has fallen by "
                    f"{fall(metrics):.0%}, the model loses what it should keep; {kept}; give a "
                    "lower --lr or a higher --benign-weight, in another --output-dir", code=1)


def say_what_was_missed(metrics):
    """At a run's end: a reward that told no picture from another, a figure that nothing watched."""
    if all(row.get("reward_std", 1) < 1e-6 for row in metrics):
        print("--reward: an epoch's rewards differed by less than 1e-6, in all epochs: nothing was "
              "learned from them", file=sys.stderr)
    given = sum(WATCHED in row for row in metrics)
    values = watched(metrics)
    if given and (len(values) < given or reference(metrics) < MEANS_NOTHING):
        print("--benign: not every epoch was watched for a model that comes apart: the CLIP of "
              f"benign prompts was {reference(metrics):.2f} at first; below .1 it means nothing, "
              "and what is no number is passed over", file=sys.stderr)
