"""A training's watch: what the model draws of the same prompts with the same noise, now and then.

Before the first epoch and with every checkpoint: half of the pictures of prompts to make safe,
half of benign ones. They are a world's validation prompts; without such, the training's own.
The CLIP of benign pictures has no reason to fall: where it does the model is coming
apart, and an unsafe rate of 0 is no safety.
"""
import math
import os
import sys

from plumbing import checkpoints, processes
from plumbing.options import UserError
from plumbing.plots import censor, save_curve, save_grid

PICTURES = 64                           # a quarter of it where nothing is counted
SEED = 2_000_000
FALL = .1                               # of the base's benign CLIP, which ends a run
MEANS_NOTHING = .1                      # agreement of a text with any picture
KEPT = {"watched_named": .9, "watched_benign_clip": .98}       # of the base's, by the best weights


def is_counted(args, data):
    """Whether what is drawn is judged: not with a reward of the user's own and nothing held out.

    That may be about anything, and need no CLIP. args, data: train.py's.
    """
    return bool(data.held_out or not args.reward)


def look(policy, watched, nudity, tools, labels, args, epoch):
    """Draw the watched prompts, save a grid of them, print and return the figures of `count`.

    watched: (prompts to make safe, benign ones); tools: judging.judges.Tools, or None: no figures.
    """
    from reward import is_flagged
    drawn = draw(policy, watched, PICTURES if tools else PICTURES // 4, args)
    pictures = drawn[-1]
    scores = nudity(pictures)
    shown = censor(pictures, is_flagged(scores, labels), policy.world.harmless)
    save_grid(os.path.join(args.output_dir, "samples", f"epoch_{epoch:04d}.png"), shown)
    if tools is None:
        return {}
    figures = count(*drawn, scores, tools, labels)
    print(f"watched {epoch:3d}  " + "  ".join(f"{name.removeprefix('watched_')} {value:.3f}"
                                              for name, value in figures.items()), flush=True)
    return figures


def draw(policy, watched, pictures, args):
    """Half of so many pictures of prompts to make safe, then half of benign ones, if there are any.

    Returns the prompts of each, which are benign (N,), the pictures (N, H, W, 3).
    """
    import numpy as np

    from prompts import cycle_prompts
    from sample import generate
    texts, seeds, is_benign = [], [], []
    for benign, prompts in enumerate(watched):
        if prompts:
            more, their_seeds = cycle_prompts(prompts, max(1, pictures // 2),
                                              SEED + len(texts))
            texts, seeds = texts + more, seeds + their_seeds
            is_benign += [bool(benign)] * len(more)
    return texts, np.array(is_benign), generate(policy, texts, seeds, args)


def count(texts, is_benign, pictures, scores, tools, labels):
    """What is seen of pictures that `draw` drew; scores: NudeNet's (N, 18) of them.

    Each a mean: "watched_unsafe", "watched_named" (where there is a judge), "watched_clip", and of
    the benign ones "watched_benign_clip".
    """
    from reward import THRESHOLD, worst_label
    clip = tools.clip(pictures, [prompt.safe_text for prompt in texts])
    values = {"watched_unsafe": worst_label(scores, labels) >= THRESHOLD}
    if tools.judge:
        values["watched_named"] = tools.judge(pictures, texts)["named"]
    values["watched_clip"] = clip
    figures = {name: float(value[~is_benign].mean()) for name, value in values.items()}
    if is_benign.any():
        figures["watched_benign_clip"] = float(clip[is_benign].mean())
    return figures


def looks(metrics):
    """The rows of metrics.jsonl that have what was watched, the base's (epoch 0) first."""
    return [row for row in metrics if "watched_unsafe" in row]


def fall(metrics):
    """By what share the last look's benign CLIP lies below the base's, or 0 where that is little.

    A CLIP that is no number has fallen whole.
    """
    values = [row["watched_benign_clip"] for row in looks(metrics) if "watched_benign_clip" in row]
    if not values or values[0] < MEANS_NOTHING:
        return 0.
    lost = 1 - values[-1] / values[0] if math.isfinite(values[-1]) else 1.
    return lost if lost > FALL else 0.


def last_good(metrics, saved):
    """The last of the saved epochs at whose look the benign CLIP had not fallen, or None."""
    rows = looks(metrics)
    good = {row["epoch"] for i, row in enumerate(rows) if not fall(rows[:i + 1])}
    return max(good & set(saved), default=None)


def best(metrics):
    """The epoch of the best look, or None: of those that keep names and CLIP the least unsafe one.

    Of several equally unsafe ones the last.
    """
    rows = looks(metrics)
    keeping = [row for row in rows[1:] if keeps(row, rows[0])]
    found = min(keeping, key=lambda row: (row["watched_unsafe"], -row["epoch"]), default=None)
    return found and found["epoch"]


def keeps(row, base):
    """Whether a look's names and benign CLIP, where it has them, are the base's but for a little.
    """
    return all(row[name] >= part * base[name] for name, part in KEPT.items() if name in row)


def check_gradient(norm, records, epoch):
    """A gradient that is not finite ends the run before the weights are touched.

    norm: of the gradient, a tensor; records: what train.py keeps of its learning calls.
    """
    if math.isfinite(norm):
        return
    bad = [record["where"] for record in records if not math.isfinite(record["total"])]
    bad = sum(processes.gather([(text, int(k)) for text, k in bad]), [])
    where = f" at step {bad[0][1]} of a batch that starts with {bad[0][0]!r}" if bad else ""
    raise UserError(f"epoch {epoch}: the gradient is {norm.item()}{where}; the update was refused, "
                    "what was saved stays; give a lower --lr, --guidance, --benign-weight, "
                    "--safe-text-weight or --base-weight")


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
            f"The run ended at epoch {metrics[-1]['epoch']}, as the model lost what it should keep;"
            f" these are epoch {good}'s weights, from before that."))
        kept = f"the weights of epoch {good}, before the fall, are in {args.output_dir}"
    raise UserError(f"epoch {metrics[-1]['epoch']}: the CLIP of benign prompts has fallen by "
                    f"{fall(metrics):.0%}, the model loses what it should keep; {kept}; give a "
                    "lower --lr or a higher --benign-weight, in another --output-dir", code=1)


def say_what_was_missed(metrics):
    """At a run's end: a reward that told no picture from another, a figure that nothing watched."""
    if all(row["reward_std"] < 1e-6 for row in metrics if "reward_std" in row):
        print("--reward: an epoch's rewards differed by less than 1e-6, in all epochs: nothing was "
              "learned from them", file=sys.stderr)
    first = metrics[0].get("watched_benign_clip")
    if first is not None and not first >= MEANS_NOTHING:
        print("--benign: the run was not watched for a model that comes apart: the CLIP of benign "
              f"prompts was {first:.2f} at first; below .1 it means nothing", file=sys.stderr)
