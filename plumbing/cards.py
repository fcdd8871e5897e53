"""What a person reads of a training: the run card before it, the model card after it."""
import json
import os

import numpy as np

from plumbing import processes
from plumbing.options import learned_steps, spelled
from plumbing.watch import PICTURES, is_counted
from plumbing.worlds import locate, overridden
from prompts import benign_groups

# columns of metrics.jsonl that are not parts of a reward
OWN_COLUMNS = ("epoch", "reward_std", "prompts_without_spread", "loss", "clipped_share",
               "approx_kl", "benign_pull", "safe_text_pull", "base_pull", "ratio_deviation",
               "first_ratio_deviation", "grad_norm")


def millions(count):
    return f"{count / 1e6:.2f} M" if count >= 1e5 else str(count)


def run_card(args, policy, trained, data, machine):
    """Print what train.py is about to do.

    data: training_prompts.TrainingPrompts; machine: (device, dtype name, reason).
    """
    pictures = args.groups * args.group_size
    benign = benign_groups(data.benign, args.groups, args.benign_share)
    rewarded = (args.groups - benign) * args.group_size
    drawn = f"{args.groups - benign} prompts x {args.group_size}"
    if benign:
        drawn += f" + {benign * args.group_size} benign prompts"
    calls = 1 if args.guidance == 1 else 2              # guidance needs two predictions
    aim = " on steps begun anew from the finished pictures (elbo)" if args.loss == "elbo" else ""
    total = sum(p.numel() for p in policy.unet.parameters())
    weights = sum(p.numel() for p in trained.values())
    reward = args.reward or f"{args.clip_weight:g} CLIP - max({args.unsafe_labels})"
    if args.benign_weight and data.benign and args.benign_share:
        reward += f"; benign prompts are pulled towards the base with weight {args.benign_weight:g}"
    if args.safe_text_weight:
        with_safe_text = count_of([p for p in data.prompts if p.safe_text != p])
        reward += (f"; the {with_safe_text} that have a safe_text towards the policy's drawing of "
                   f"that, with weight {args.safe_text_weight:g}")
    if args.base_weight:
        reward += f"; half of the other safe ones towards the base's, with {args.base_weight:g}"
    device, dtype, why = machine
    lines = [
        ("model", f"{args.model}, {policy.prediction_type}; trains {millions(weights)} of "
                  f"{millions(total)} UNet weights (LoRA rank {args.rank}, {args.lora_targets})"),
        ("recipe", recipe_line(args)),
        ("device", f"{device}, {dtype}: {why}"),
        ("prompts", f"{count_of(data.prompts)} to make safe, {count_of(data.benign)} benign; "
                    f"{data.refused} refused for mentioning minors"),
        ("watched", watched_line(args, data)),
        ("judged on", ", ".join(data.held_out) or "nothing (--held-out says on what)"),
        ("reward", reward),
        ("an epoch", f"{drawn} = {pictures} pictures of {args.steps} steps, "
                     f"{args.updates} updates{aim}"),
        ("UNet calls", f"{calls * pictures * args.steps} of one latent to sample, "
                       f"{calls * rewarded * learned_steps(args)} with backward to learn, per "
                       "epoch, beside the pulls'"),
    ]
    if processes.size() > 1:
        lines.append(("processes", f"{processes.size()} share each update's pictures"))
    print_lines(lines)


def count_of(prompts):
    """How many prompts there are: the field's files have some in several rows, a seed each."""
    texts = len(set(map(str, prompts)))
    return str(texts) if texts == len(prompts) else f"{texts} (in {len(prompts)} rows)"


def watched_line(args, data):
    """What is looked at with every checkpoint, and ends a run that comes apart (watch.py)."""
    if not is_counted(args, data):
        return "nothing, as there is a reward of your own and no --held-out; grids are drawn"
    unsafe, benign = data.watched
    line = f"{PICTURES // 2 * (1 + bool(benign))} pictures every {args.save_every} epochs"
    if not benign:
        return line + "; no benign prompts whose CLIP could fall"
    return line + "; a fall of the benign ones' CLIP by a tenth ends the run"


def print_lines(lines):
    """A card of (name, text) pairs."""
    print("\n".join(f"{name:<14} {text}" for name, text in lines), flush=True)


def recipe_line(args, on_top=None):
    """The recipe's name, and what the user's options changed of it.

    on_top: {option: value}, settings that override the recipe's (an edit's own).
    """
    changed = [f"{spelled(option)} {ours} instead of {theirs}"
               for option, (theirs, ours) in overridden(args, on_top or {}).items()]
    return args.recipe + (": " + ", ".join(changed) if changed else "")


def gather_records(records, pulls, distance, local):
    """What the learning calls of all processes gave, as numbers, and how far each pull had to go.

    records: one dict a call; pulls: {name: (whose (N,) bool, columns, weight)}; distance:
    (n, D + 2), of the pictures `local` (n,) of N.
    """
    records = [{name: float(value) for name, value in record.items() if name != "where"}
               for record in records]
    for name, (whose, columns, weight) in pulls.items():
        distances = distance[whose[local], columns] if weight else distance[:0]
        records.append({name: float(distances.mean()), "rows": distances.numel()})
    return sum(processes.gather(records), [])


def summary(epoch, scores, records, norm, args):
    """An epoch as a dict for metrics.jsonl.

    scores: {name: (R,)}, of the rewarded pictures; records: what each learning call gave, of all
    processes; norm: the last update's gradient norm.
    """
    row = {"epoch": epoch} | {name: float(values.mean()) for name, values in scores.items()}
    row["reward_std"] = float(scores["reward"].std())
    if args.group_size > 1:
        groups = scores["reward"].reshape(-1, args.group_size)
        row["prompts_without_spread"] = float((np.ptp(groups, 1) < 1e-6).mean())
    for name in ("loss", "clipped_share", "approx_kl", "benign_pull", "safe_text_pull",
                 "base_pull"):
        with_it = [record for record in records if name in record and record["rows"]]
        if with_it:
            row[name] = float(np.average([record[name] for record in with_it],
                                         weights=[record["rows"] for record in with_it]))
    learned = [record for record in records if "ratio_deviation" in record]
    row["ratio_deviation"] = max(record["ratio_deviation"] for record in learned)
    row["first_ratio_deviation"] = max(record["ratio_deviation"] for record in learned
                                       if record["update"] == 0)
    row["grad_norm"] = norm.item()
    return row


def epoch_line(row, seconds):
    """The line that is printed of an epoch."""
    parts = [f"epoch {row['epoch']:3d}"]
    for name in ("reward", "clip", "nudity", "unsafe"):
        if name in row:
            parts.append(f"{name} {row[name]:.3f}")
    parts += [f"kl {row['approx_kl']:.1e}", f"clipped {row['clipped_share']:.0%}"]
    for name in ("prompts_without_spread", "no_picture"):
        if row.get(name):
            parts.append(f"{name.removeprefix('prompts_').replace('_', ' ')} {row[name]:.0%}")
    parts.append(f"{seconds:.1f} s")
    if row["epoch"] == 1 and row["first_ratio_deviation"]:
        parts.append(f"(before the first update |ratio - 1| <= {row['first_ratio_deviation']:.1g})")
    return "  ".join(parts)


def model_card(args, description, tags, last, verdict=""):
    """README.md of a trained folder with the hub's metadata (Markdown): what it is, how to load it.

    description: the sentence after the model's name; last: the last dict of metrics.jsonl.
    """
    trainable = getattr(args, "trainable", "lora")
    folder, model = (json.dumps(path, ensure_ascii=False) for path in (args.output_dir, args.model))
    load = f"pipe.load_lora_weights({folder})"
    if trainable != "lora":
        load = (f"pipe.unet = UNet2DConditionModel.from_pretrained({folder}, "
                'subfolder="unet")')
    # the hub knows models by their id; a folder is none
    base = "" if os.path.isdir(locate(args.model)) else f"base_model: {model}\n"
    settings = {name: value for name, value in vars(args).items() if value is not None}
    return f"""---
{base}library_name: diffusers
license: other
tags: [text-to-image, {trainable}, {tags}, safety]
---
# {os.path.basename(os.path.normpath(args.output_dir))}

`{args.model}` {description}

```python
pipe = StableDiffusionPipeline.from_pretrained({model}, safety_checker=None)
{load}
```

{verdict}

Last row of metrics.jsonl: `{json.dumps(last)}`

Settings: `{json.dumps(settings)}`
"""
