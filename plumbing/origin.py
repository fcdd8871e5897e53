"""Which base a run was trained on: a base is known by its files, wherever it lies."""
import glob
import hashlib
import os

from plumbing.worlds import DEFAULT_MODEL, locate


def was_trained_on(run_args, model):
    """Whether a run's base is this model, wherever either lies."""
    base = run_args.get("base")
    if base:
        return base == base_hash(model)
    return is_same_base(run_args.get("model", DEFAULT_MODEL), model)


def is_same_base(one, other):
    """Whether two models, folders or hub ids, are one: the same folder, or the same weights."""
    if is_same_folder(one, other):
        return True
    return base_hash(one) is not None and base_hash(one) == base_hash(other)


def is_same_folder(one, other):
    return os.path.realpath(locate(one)) == os.path.realpath(locate(other))


def files_of(folder):
    """{path in a pipeline's folder: the path} of what draws: weights, configs, vocabulary."""
    found = [path for part in ("unet", "text_encoder", "vae", "tokenizer", "scheduler")
             for path in sorted(glob.glob(os.path.join(glob.escape(folder), part, "*")))
             if path.endswith((".json", ".txt", ".safetensors"))]
    return {os.path.relpath(path, folder): path for path in found
            if os.path.isfile(path) and ".fp16." not in path}


def base_hash(model):
    """What a model is, wherever it lies: a hash of its files, or None where there are none.

    Of a file of more than a megabyte its size and its last megabyte stand for all of it: another
    training changes every part of the weights, and gigabytes are not read at every start.
    """
    digest, most = hashlib.sha256(), 2 ** 20
    files = files_of(locate(model))
    for name, path in files.items():
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - most))
            digest.update(f"{name} {size}".encode() + file.read())
    return digest.hexdigest() if files else None


def sha256_of(*paths):
    """The hash of the content of those files that are there, one after the other."""
    digest = hashlib.sha256()
    for path in filter(os.path.isfile, paths):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def hashes(paths):
    """{path: SHA-256} of the files, and of the weights and configs in the folders, that are there.
    """
    files = []
    for path in paths:
        inside = glob.glob(os.path.join(glob.escape(path), "*.safetensors"))
        files += [path, *sorted(inside), *files_of(path).values()]
    return {path: sha256_of(path) for path in files if os.path.isfile(path)}
