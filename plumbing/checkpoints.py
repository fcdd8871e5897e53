"""A run that resumes where it was cut off: its folder, its settings, its checkpoints."""
import hashlib
import io
import json
import math
import os
import re
import sys

from plumbing import processes
from plumbing.files import check_places, make_folder, write
from plumbing.options import UserError, spelled
from plumbing.origin import base_hash, is_same_folder, sha256_of
from plumbing.worlds import DEFAULT_MODEL, read_json

LORA_FILE = "pytorch_lora_weights.safetensors"


# ---- a run's folder ------------------------------------------------------------------------------

def read_args(folder, option="--output-dir"):
    """A run's args.json, {option: value}. UserError where it is damaged."""
    path = os.path.join(folder, "args.json")
    found = read_json(path, option)
    for name in ("model", "recipe"):
        if not isinstance(found.get(name, ""), str):
            raise UserError(f"{option}: {path} says that {name} is {found[name]!r}, where a text "
                            "is needed")
    return found


FILES = ("prompts", "benign", "held_out")       # options whose values are files or texts


def as_recorded(args):
    """args as args.json keeps them: paths are absolute, "sha256" has the content of each file.

    So a run is found again from another working directory, and a file that was edited is noticed.
    """
    kept = json.loads(json.dumps(vars(args)))
    kept["sha256"] = {}
    if os.path.isdir(args.model) and not is_same_folder(args.model, DEFAULT_MODEL):
        kept["model"] = os.path.abspath(args.model)
    kept["base"] = base_hash(args.model)
    for option in FILES:
        for i, path in enumerate(kept.get(option) or []):
            if os.path.isfile(path):
                kept[option][i] = os.path.abspath(path)
                states = os.path.splitext(path)[0] + ".safetensors"     # an attack's
                kept["sha256"][kept[option][i]] = sha256_of(path, states)
    if args.recipe.endswith(".json"):
        kept["recipe"] = os.path.abspath(args.recipe)
    if kept.get("reward"):                              # FILE:FUNCTION
        path, _, function = kept["reward"].rpartition(":")
        kept["reward"] = f"{os.path.abspath(path)}:{function}"
        kept["sha256"][kept["reward"]] = sha256_of(path) + function
    return kept


def check_folder(args):
    """Is the folder new, or this very run's? Returns args as JSON, to be written there.

    --epochs and --iterations may be raised, and what changes nothing but rounding may change; any
    other change is another run, unless nothing was saved of this one yet.
    """
    folder = args.output_dir
    make_folder(folder)
    check_places(folder, ("args.json", "metrics.jsonl", "curve.png", "README.md", "verdict.json",
                          LORA_FILE), ("best", "checkpoints", "samples", "unet"))
    saved = saved_epochs(os.path.join(folder, "checkpoints"))
    holds = [name for name in (LORA_FILE, "unet", "model_index.json", "README.md")
             if os.path.exists(os.path.join(folder, name))] + ["checkpoints"] * bool(saved)
    if not os.path.exists(os.path.join(folder, "args.json")):
        if holds:
            raise UserError(f"--output-dir: {folder} holds {holds[0]}, and no args.json says that "
                            "a run of this program's made it; move it, or give another folder")
        return json.dumps(as_recorded(args), indent=1)
    ours = as_recorded(args)
    if holds:
        theirs = read_args(folder)
        if "sha256" not in theirs:
            raise UserError(f"--output-dir: {folder} was made by an earlier edition of this "
                            "program and can't be resumed; give another folder (its weights still "
                            "load with --checkpoint)")
        check_same_run(folder, ours, theirs)
        check_length(ours, theirs, saved)
    return json.dumps(ours, indent=1)


def check_same_run(folder, ours, theirs):
    """UserError where two runs' args differ in more than their length."""
    may_change = {"epochs", "iterations", "output_dir", "sha256", "base", "recipe", "save_every",
                  "device", "compile", "gradient_checkpointing"}
    if "groups" in ours:                                # train.py's, where it changes the rounding
        may_change |= {"batch_size"}
    changed = [name for name in sorted({*ours, *theirs} - may_change)
               if not is_same(name, ours, theirs)]
    if not changed:
        return
    what = ", ".join(f"{spelled(name)} was {theirs.get(name)}, is {ours.get(name)}"
                     for name in changed[:4])
    if all(ours.get(name) == theirs.get(name) for name in changed):
        what += ", with another content"
    raise UserError(f"--output-dir: {folder} holds another run ({what}); give another folder")


def check_length(ours, theirs, saved):
    """UserError where less is asked for than was saved; more is said where it is another run."""
    name = "epochs" if "epochs" in ours else "iterations"
    if saved and ours[name] < max(saved):
        raise UserError(f"--{name}: {ours[name]} is given, and {max(saved)} are done; "
                        "give as many at least")
    is_longer = theirs.get(name) != ours[name]
    if is_longer and ours.get("lr_schedule", "constant") != "constant" and processes.is_lead():
        print(f"--{name}: {ours[name]} instead of {theirs.get(name)}: the rate now falls to 0 at "
              "another epoch, so this is not the run that begins with this many", file=sys.stderr)


def is_same(name, ours, theirs):
    """Whether two runs agree in an option: files by their content, the model by its weights."""
    def content(kept):
        values = kept.get(name)
        several = values if isinstance(values, list) else [values]
        return [kept.get("sha256", {}).get(value, value) for value in several]
    if name == "model" and ours["base"]:
        return ours["base"] == theirs.get("base")
    return content(ours) == content(theirs)


def write_metrics(folder, metrics):
    """metrics.jsonl: one line per dict; null where a number is none, as JSON knows no NaN."""
    lines = []
    for row in metrics:
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        lines.append(json.dumps(finite) + "\n")
    write(os.path.join(folder, "metrics.jsonl"), "".join(lines))


# ---- saving and loading --------------------------------------------------------------------------

def save_checkpoint(folder, state, limit=2):
    """epoch_N.pt, then the pointer latest.json with each file's SHA-256; the newest `limit` stay,
    or all where it is None (a LoRA's are small).

    state["epoch"] is N. The pointer is replaced at the end, so that it never names a torn file.
    """
    import torch
    buffer = io.BytesIO()
    torch.save(state, buffer)
    name = file_of(state["epoch"])
    write(os.path.join(folder, name), buffer.getvalue())
    entries = [entry for entry in read_pointer(folder) if entry["file"] != name]
    entries.insert(0, {"file": name, "sha256": hashlib.sha256(buffer.getvalue()).hexdigest()})
    limit = len(entries) if limit is None else limit
    write(os.path.join(folder, "latest.json"), json.dumps(entries[:limit]))
    for entry in entries[limit:]:
        if os.path.exists(os.path.join(folder, entry["file"])):
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


def load_everywhere(folder):
    """load_checkpoint; UserError where a run's processes do not all find the same epoch's."""
    state = load_checkpoint(folder)
    if len(set(processes.gather(state and state["epoch"]))) > 1:
        raise UserError(f"--output-dir: not every process sees {os.path.dirname(folder)}'s "
                        "checkpoints; several nodes need a folder that they share")
    return state


def read_pointer(folder):
    try:
        with open(os.path.join(folder, "latest.json"), encoding="utf-8") as file:
            return [{"file": entry["file"], "sha256": entry["sha256"]} for entry in json.load(file)
                    if re.fullmatch(r"epoch_\d+\.pt", entry["file"])]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def copy_of(tensors):
    """{name: tensor} -> the same values, detached, to be saved or compared with."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def restore(tensors, saved):
    """Give {name: tensor} the saved values, in place."""
    for name, tensor in tensors.items():
        tensor.data.copy_(saved[name])
