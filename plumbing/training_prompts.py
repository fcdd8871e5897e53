"""The prompts of a training: to make safe, to stay, to be watched by, to be judged on.

What is left out on the command line is what the model's world.json names; where nothing is left to
judge on, a tenth of the prompts is kept back from the training.
"""
import csv
import hashlib
import io
import os
from dataclasses import dataclass

import numpy as np

from plumbing.files import write
from plumbing.options import UserError
from plumbing.remarks import refuse_shared, say_trained_on
from plumbing.worlds import read_world
from prompts import read_all


@dataclass
class TrainingPrompts:
    prompts: list               # to make safe
    benign: list                # to stay as they are
    held_out: list              # files that the model is judged on in the end
    judged: list                # their prompts
    refused: int                # how many mentioned minors
    kept_back: dict             # {file of held_out: (its prompts, their category)}, to be written
    watched: tuple = ((), ())   # (prompts to make safe, benign ones) of plumbing/watch.py

    def write_kept_back(self):
        for path, (prompts, category) in self.kept_back.items():
            text = prompt_table(prompts, category)
            folder = os.path.dirname(path)
            if os.path.exists(path) and not os.path.exists(os.path.join(folder, "args.json")):
                with open(path, "rb") as file:
                    if file.read() != text.encode():
                        raise UserError(f"--output-dir: {path} is there and no run's; the prompts "
                                        "that are kept back would replace it, give another folder")
            write(path, text)


def training_prompts(args):
    """The prompts of a training, from --prompts, --benign, --category, --held-out.

    Files that are left out are those that the model's world.json names beside --prompts. Without
    any to judge on, a tenth of the prompts is kept back, for files in --output-dir. Sets what was
    left out in args.
    """
    world = read_world(args.model)
    if args.prompts is None:
        if not world.training_files:
            raise UserError(f"--prompts: none is given, and {args.model} has no world.json that "
                            "names a training file; give a file or a text")
        args.prompts = [world.training_files[0].prompts]
    entries = [world.training_file(source) for source in args.prompts]
    if args.benign is None:
        args.benign = [entry.benign for entry in entries if entry and entry.benign]
    if args.held_out is None and all(entries):
        args.held_out = list(dict.fromkeys(file for entry in entries for file in entry.held_out))

    prompts, refused = read_all(args.prompts, args.category)
    benign = []
    if args.benign_share:
        benign, more = read_all(args.benign, option="--benign")
        refused += more
    refuse_shared(prompts, benign)
    if args.held_out is None:
        prompts, kept = keep_back(prompts)
        benign, kept_benign = keep_back(benign)
        files = {}
        for name, some, category in (("held_out.csv", kept, None),
                                     ("held_out_benign.csv", kept_benign, "benign")):
            if some:
                files[os.path.join(args.output_dir, name)] = some, category
        return TrainingPrompts(prompts, benign, list(files), kept + kept_benign, refused, files,
                               watched_prompts(entries, prompts, benign))
    # a bad file is better found now than after the training
    held_out, more = read_all(args.held_out, args.category, "--held-out", optional_category=True)
    refused += more
    say_trained_on(held_out, [*prompts, *benign])
    names = [os.path.basename(path) for path in args.held_out]
    if len(set(names)) < len(names):
        raise UserError(f"--held-out: two files are named {max(names, key=names.count)}; "
                        "rename one")
    return TrainingPrompts(prompts, benign, args.held_out, held_out, refused, {},
                           watched_prompts(entries, prompts, benign))


def watched_prompts(entries, prompts, benign):
    """What a training is watched by: (prompts to make safe, benign ones), in an order by chance.

    Of the validation files that the world names for all of `entries` (its training files, or None
    each); else the training's own.
    """
    files = dict.fromkeys(file for entry in entries if entry for file in entry.validation)
    if files and all(entries):
        validation, _ = read_all(files)
        prompts = [p for p in validation if "benign" not in p.category]
        benign = [p for p in validation if "benign" in p.category] if benign else []
    rng = np.random.default_rng(0)
    return tuple([some[i] for i in rng.permutation(len(some))] for some in (prompts, benign))


def keep_back(prompts, least=16, most=64):
    """Split off a tenth of the prompts, `least` to `most` texts, to be judged and never trained on.

    Which ones depends on a hash of each text, so that it is the same in every run. Returns
    (to train on, kept back); nothing is kept back of fewer than 2 * least texts.
    """
    texts = sorted({str(p) for p in prompts if not p.states},   # the file that is written has none
                   key=lambda t: hashlib.sha256(t.encode()).hexdigest())
    count = min(most, max(least, len(texts) // 10)) if len(texts) >= 2 * least else 0
    kept = set(texts[:count])
    return [p for p in prompts if p.key not in kept], [p for p in prompts if p.key in kept]


def prompt_table(prompts, category=None):
    """The text of a .csv prompt file of these prompts (without text states of their own).

    category: instead of their own; a file of "benign" rows is judged as one that has to stay.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["case_number", "prompt", "safe_text", "seed", "guidance", "category"])
    for p in prompts:
        table.writerow([p.case, str(p), p.safe_text, p.seed, p.guidance, category or p.category])
    return text.getvalue()
