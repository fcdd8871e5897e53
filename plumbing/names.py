"""The names by which weights are given: PART[@WEIGHT](+PART[@WEIGHT])…

A part is a folder of weights or a LoRA file, "base" the base model; LoRAs add:
out/shield+out/task@0.5. A last part that is a method's name says how pictures are drawn:
out/shield+sld-medium, base+negative:bare skin.
"""
import glob
import math
import os
from dataclasses import dataclass

from plumbing.checkpoints import LORA_FILE, read_args
from plumbing.options import UserError
from plumbing.origin import was_trained_on
from plumbing.worlds import DEFAULT_MODEL, read_world


@dataclass(frozen=True)
class Checkpoint:
    """What a name such as out/a+out/b@0.5+negative:skin means."""
    parts: tuple = ()           # of (path, weight); none: the base model
    method: str | None = None
    concept: str = ""           # the method's words, after its colon

    @property
    def folder(self):
        """The first part's path, or None for the base model."""
        return self.parts[0][0] if self.parts else None


def parse_checkpoint(text, is_method=lambda name: False):
    """A name -> Checkpoint. UserError where a part is empty or its weight is no number."""
    parts, pieces, method, concept = [], text.split("+"), None, ""
    for i in range(1, 0 if os.path.exists(text) else len(pieces)):
        name, _, words = "+".join(pieces[i:]).partition(":")
        if is_method(name):
            method, concept, pieces = name, words, pieces[:i]
            break
    while pieces:
        taken = next((n for n in range(len(pieces), 0, -1)     # a path may hold a + of its own
                      if is_there("+".join(pieces[:n]))), 1)
        part = "+".join(pieces[:taken])
        pieces = pieces[taken:]
        weight = 1.
        if "@" in part and not os.path.exists(part):
            part, _, given = part.rpartition("@")
            try:
                weight = float(given)
                if not math.isfinite(weight) or part == "base":
                    raise ValueError
            except ValueError:
                raise UserError(f"--checkpoint: {text} has the weight {given!r}; "
                                "a LoRA takes a number after @, as in out/task@0.5") from None
        if not part:
            raise UserError(f"--checkpoint: {text} has an empty part; "
                            "a name is PART[@WEIGHT]+PART[@WEIGHT]…")
        if part != "base":
            parts.append((os.path.normpath(part) if os.path.exists(part) else part, weight))
    return Checkpoint(tuple(parts), method, concept)


def is_there(part):
    """Whether a PART or PART@WEIGHT names an existing path."""
    path, _, weight = part.rpartition("@")
    return os.path.exists(part) or (os.path.exists(path) and "+" not in weight)


def base_of(checkpoint, model=None):
    """The base model: as given, else what the checkpoint's first run was trained from."""
    for path, _ in checkpoint.parts if checkpoint and model is None else ():
        if os.path.isfile(os.path.join(path, "model_index.json")):
            return path                                 # a pipeline is its own base
        if os.path.isfile(os.path.join(path, "args.json")):
            return read_args(path, "--checkpoint").get("model", DEFAULT_MODEL)
    return DEFAULT_MODEL if model is None else model


def choose_settings(args, checkpoint):
    """For parse_with_recipe: the model's recipe, and what a checkpoint's own run was drawn with.

    checkpoint: a Checkpoint, or None for the base model. --recipe overrides the run.
    """
    recipe, own = read_world(base_of(checkpoint, args.model)).recipe, {}
    if checkpoint and checkpoint.folder and not args.recipe:
        if os.path.isfile(os.path.join(checkpoint.folder, "args.json")):
            run_args = read_args(checkpoint.folder, "--checkpoint")
            own = {name: run_args[name] for name in ("steps", "eta", "guidance")
                   if name in run_args}
            if not run_args.get("recipe", ".json").endswith(".json"):
                recipe = run_args["recipe"]             # a file of the user's may be gone
    return recipe, own


def newest_run(model=None):
    """The run in out/ that was finished last, of this model if one is named, or None."""
    runs = []
    for path in glob.glob("out/*/args.json"):
        folder = os.path.dirname(path)
        for name in (LORA_FILE, "unet"):
            weights = os.path.join(folder, name)
            if os.path.exists(weights):
                try:
                    run_args = read_args(folder)
                except UserError:                       # it is damaged, and nobody named it
                    break
                if model is None or was_trained_on(run_args, model):
                    runs.append((os.path.getmtime(weights), folder))
                break
    return max(runs)[1] if runs else None


def stem(path):
    """A file's name without its ending."""
    return os.path.splitext(os.path.basename(path))[0]
