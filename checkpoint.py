"""Not losing work: files that appear whole or not at all, and a run that goes on where it was cut."""
import hashlib
import io
import json
import os
import sys

from prompts import UserError
from sample import make_folder, read_args


def write(path, data):
    """Whole or not at all: bytes into path. A full disk ends the run with a sentence."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path + ".tmp", "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".tmp", path)
    except OSError as error:
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        raise UserError(f"--output-dir: {path} could not be written ({error.strerror}); "
                        "the last checkpoint stands, and the same command goes on from it") from None


def save_checkpoint(folder, state, keep=2):
    """checkpoints/epoch_N.pt, then the pointer latest.json with each file's SHA-256, newest first; `keep` of them stay."""
    import torch
    buffer = io.BytesIO()
    torch.save(state, buffer)
    name = f"epoch_{state['epoch']:04d}.pt"
    write(os.path.join(folder, name), buffer.getvalue())
    entries = [e for e in read_pointer(folder) if e["file"] != name]
    entries.insert(0, {"file": name, "sha256": hashlib.sha256(buffer.getvalue()).hexdigest()})
    write(os.path.join(folder, "latest.json"), json.dumps(entries[:keep]).encode())
    for entry in entries[keep:]:
        if os.path.exists(os.path.join(folder, entry["file"])):
            os.remove(os.path.join(folder, entry["file"]))


def write_metrics(folder, rows):
    write(os.path.join(folder, "metrics.jsonl"), "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_pointer(folder):
    try:
        with open(os.path.join(folder, "latest.json")) as file:
            return [{"file": entry["file"], "sha256": entry["sha256"]} for entry in json.load(file)]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def load_checkpoint(folder):
    """The newest checkpoint whose content is whole, or None."""
    import torch
    for entry in read_pointer(folder):
        try:
            with open(os.path.join(folder, entry["file"]), "rb") as file:
                data = file.read()
        except OSError:
            continue
        if hashlib.sha256(data).hexdigest() == entry["sha256"]:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if read_pointer(folder):
        print(f"no checkpoint in {folder} is whole; starting anew", file=sys.stderr)
    return None


def check_folder(args):
    """Is the folder new, or this very run's (epochs or iterations may be raised)? -> args as JSON."""
    make_folder(args.output_dir)
    path = os.path.join(args.output_dir, "args.json")
    mine = json.loads(json.dumps(vars(args)))
    if os.path.exists(path):
        theirs = read_args(args.output_dir)
        other = [k for k in sorted({*mine, *theirs} - {"epochs", "iterations", "output_dir"}) if mine.get(k) != theirs.get(k)]
        if other:
            said = ", ".join(f"--{k.replace('_', '-')} was {theirs.get(k)}, is {mine.get(k)}" for k in other[:4])
            raise UserError(f"--output-dir: {args.output_dir} holds another run ({said}); "
                            "give another folder")
    return json.dumps(mine, indent=1).encode()
