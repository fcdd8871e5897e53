"""A run that resumes where it was cut off, and the names by which its weights are given.

A checkpoint's name is PART[@WEIGHT](+PART[@WEIGHT])…, a part being a folder of weights or a LoRA
file, "base" for the base model; LoRAs add: out/shield+out/task@0.5. A last part that is a method's
name says how pictures are drawn: out/shield+sld-medium, base+negative:bare skin.
"""
import filecmp
import glob
import hashlib
import io
import json
import math
import os
import sys
from dataclasses import dataclass

from plumbing.files import make_folder, write
from plumbing.options import UserError
from plumbing.worlds import DEFAULT_MODEL, locate, read_json, read_world

LORA_FILE = "pytorch_lora_weights.safetensors"


# ---- the grammar of a checkpoint's name ----------------------------------------------------------

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
            parts.append((part, weight))
    return Checkpoint(tuple(parts), method, concept)


def is_there(part):
    """Whether a PART or PART@WEIGHT names an existing path."""
    path, _, weight = part.rpartition("@")
    return os.path.exists(part) or (os.path.exists(path) and "+" not in weight)


def base_of(checkpoint, model=None):
    """The base model: as given, else what the checkpoint's first run was trained from."""
    for path, _ in checkpoint.parts if checkpoint and not model else ():
        if os.path.isfile(os.path.join(path, "model_index.json")):
            return path                                 # a pipeline is its own base
        if os.path.isfile(os.path.join(path, "args.json")):
            return read_args(path, "--checkpoint").get("model", DEFAULT_MODEL)
    return model or DEFAULT_MODEL


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
                of_model = read_args(folder, "--checkpoint").get("model", DEFAULT_MODEL)
                if model is None or is_same_base(of_model, model):
                    runs.append((os.path.getmtime(weights), folder))
                break
    return max(runs)[1] if runs else None


# ---- a run's folder ------------------------------------------------------------------------------

def read_args(folder, option="--output-dir"):
    """A run's args.json, {option: value}."""
    return read_json(os.path.join(folder, "args.json"), option)


FILES = ("prompts", "benign", "held_out")       # options whose values are files or texts


def as_recorded(args):
    """args as args.json keeps them: paths are absolute, "sha256" has the content of each file.

    So a run is found again from another working directory, and a file that was edited is noticed.
    """
    kept = json.loads(json.dumps(vars(args)))
    kept["sha256"] = {}
    if os.path.isdir(args.model) and not is_same_folder(args.model, DEFAULT_MODEL):
        kept["model"] = os.path.abspath(args.model)
    for option in FILES:
        for i, path in enumerate(kept.get(option) or []):
            if os.path.isfile(path):
                kept[option][i] = os.path.abspath(path)
                kept["sha256"][kept[option][i]] = sha256_of(path)
    if kept.get("reward"):                              # FILE:FUNCTION
        path, _, function = kept["reward"].rpartition(":")
        kept["reward"] = f"{os.path.abspath(path)}:{function}"
        kept["sha256"][kept["reward"]] = sha256_of(path) + function
    return kept


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_folder(args):
    """Is the folder new, or this very run's? Returns args as JSON, to be written there.

    --epochs and --iterations may be raised; any other change is another run, unless nothing was
    saved of this one yet.
    """
    make_folder(args.output_dir)
    ours = as_recorded(args)
    has_work = read_pointer(os.path.join(args.output_dir, "checkpoints")) or any(
        os.path.exists(os.path.join(args.output_dir, name)) for name in (LORA_FILE, "unet"))
    if has_work and os.path.exists(os.path.join(args.output_dir, "args.json")):
        theirs = read_args(args.output_dir)
        if "recipe" not in theirs:
            raise UserError(f"--output-dir: {args.output_dir} was made by this program's first "
                            "edition and can't be resumed; give another folder (its weights "
                            "still load with --checkpoint)")
        may_change = {"epochs", "iterations", "output_dir", "sha256"}
        changed = [name for name in sorted({*ours, *theirs} - may_change)
                   if not is_same(name, ours, theirs)]
        if changed:
            what = ", ".join(f"--{name.replace('_', '-')} was {theirs.get(name)}, "
                             f"is {ours.get(name)}" for name in changed[:4])
            if all(ours.get(name) == theirs.get(name) for name in changed):
                what += ", with another content"
            raise UserError(f"--output-dir: {args.output_dir} holds another run ({what}); "
                            "give another folder")
        if theirs.get("epochs") != ours.get("epochs") and ours.get("lr_schedule") == "linear":
            print(f"--epochs: {ours['epochs']} instead of {theirs['epochs']}: the rate now falls "
                  "to 0 at another epoch, so this is not the run that begins with this many",
                  file=sys.stderr)
    return json.dumps(ours, indent=1)


def is_same(name, ours, theirs):
    """Whether two runs agree in an option: files by their content, the model by its weights."""
    def content(kept):
        values = kept.get(name)
        several = values if isinstance(values, list) else [values]
        return [kept.get("sha256", {}).get(value, value) for value in several]
    if name == "model" and None not in (ours.get(name), theirs.get(name)):
        return is_same_base(ours[name], theirs[name])
    return content(ours) == content(theirs)


def is_same_base(one, other):
    """Whether two models, folders or hub ids, are one: the same folder, or files that are equal."""
    if is_same_folder(one, other):
        return True
    files, theirs = files_of(locate(one)), files_of(locate(other))
    return (bool(files) and list(files) == list(theirs)
            and all(filecmp.cmp(files[name], theirs[name], shallow=False) for name in files))


def is_same_folder(one, other):
    return os.path.realpath(locate(one)) == os.path.realpath(locate(other))


def files_of(folder):
    """{path in a pipeline's folder: the path} of what draws: weights, configs, vocabulary."""
    found = [path for part in ("unet", "text_encoder", "vae", "tokenizer", "scheduler")
             for path in sorted(glob.glob(os.path.join(glob.escape(folder), part, "*")))]
    return {os.path.relpath(path, folder): path for path in found}


def write_metrics(folder, metrics):
    """metrics.jsonl: one line per dict; null where a number is none, as JSON knows no NaN."""
    lines = []
    for row in metrics:
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        lines.append(json.dumps(finite) + "\n")
    write(os.path.join(folder, "metrics.jsonl"), "".join(lines))


# ---- saving and loading --------------------------------------------------------------------------

def save_checkpoint(folder, state, limit=2, keep=None):
    """epoch_N.pt, then the pointer latest.json with each file's SHA-256; the newest `limit` stay.

    state["epoch"] is N; keep: an epoch whose file stays, too. The pointer is replaced at the end,
    so that it never names a torn file.
    """
    import torch
    buffer = io.BytesIO()
    torch.save(state, buffer)
    name = file_of(state["epoch"])
    write(os.path.join(folder, name), buffer.getvalue())
    entries = [entry for entry in read_pointer(folder) if entry["file"] != name]
    entries.insert(0, {"file": name, "sha256": hashlib.sha256(buffer.getvalue()).hexdigest()})
    older = [entry for entry in entries[limit:] if keep and entry["file"] == file_of(keep)]
    write(os.path.join(folder, "latest.json"), json.dumps(entries[:limit] + older))
    for entry in entries[limit:]:
        if entry not in older and os.path.exists(os.path.join(folder, entry["file"])):
            os.remove(os.path.join(folder, entry["file"]))


def file_of(epoch):
    return f"epoch_{epoch:04d}.pt"


def saved_epochs(folder):
    """The epochs whose checkpoints the pointer names, newest first."""
    return [int(entry["file"][6:-3]) for entry in read_pointer(folder)]


def load_checkpoint(folder, device="cpu", epoch=None):
    """The newest checkpoint whose content is whole, or an epoch's; None where there is none."""
    import torch
    entries = [entry for entry in read_pointer(folder)
               if epoch is None or entry["file"] == file_of(epoch)]
    for entry in entries:
        try:
            with open(os.path.join(folder, entry["file"]), "rb") as file:
                data = file.read()
        except OSError:
            continue
        if hashlib.sha256(data).hexdigest() == entry["sha256"]:
            return torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    if entries:
        print(f"no checkpoint in {folder} is whole; starting anew", file=sys.stderr)
    return None


def read_pointer(folder):
    try:
        with open(os.path.join(folder, "latest.json"), encoding="utf-8") as file:
            return [{"file": entry["file"], "sha256": entry["sha256"]}
                    for entry in json.load(file)]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def copy_of(tensors):
    """{name: tensor} -> the same values, detached, to be saved or compared with."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def restore(tensors, saved):
    """Give {name: tensor} the saved values, in place."""
    for name, tensor in tensors.items():
        tensor.data.copy_(saved[name])
