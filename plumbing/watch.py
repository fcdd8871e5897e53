"""A training's watch: has the model lost what it should keep?

Watched is CLIP's agreement on benign prompts, which has no reason to fall: where it does, the
model is coming apart, and an unsafe rate of 0 is no safety.
"""
import numpy as np

WATCHED = "benign_clip"                 # the part "clip" of a reward, on benign prompts
WINDOW = 5                              # epochs, the first and the last ones
FALL = .1                               # of the first ones' mean, at most
MEANS_NOTHING = .1                      # agreement of a text with any picture


def watched(metrics):
    """The watched figure of every epoch that has it, [(epoch, value)]."""
    return [(row["epoch"], row[WATCHED]) for row in metrics if WATCHED in row]


def reference(metrics):
    """The mean of the first epochs."""
    return float(np.mean([value for _, value in watched(metrics)[:WINDOW]]))


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
