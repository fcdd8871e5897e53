"""What was drawn before: arrays kept by key, and all that a latent's key depends on."""
import hashlib
import inspect
import json
import os
from importlib import import_module

import numpy as np

import rivals
from plumbing.files import make_folder
from plumbing.options import UserError
from plumbing.origin import hashes


class Store:
    """Arrays by key (latents, a detector's scores, a blocker's answers), each a file in a folder.

    A file appears whole or not at all, whoever else writes it at the same time. What can't be read
    (a disk was full, a copy was cut) counts as absent, and is made again.
    """

    def __init__(self, folder):
        self.folder = folder
        make_folder(folder, "--cache")

    def path(self, key):
        return os.path.join(self.folder, key[:2], key + ".npy")

    def __contains__(self, key):
        try:
            self[key]
        except Exception:                               # np.load raises all kinds of them
            return False
        return True

    def __getitem__(self, key):
        return np.load(self.path(key), allow_pickle=False)

    def __setitem__(self, key, array):
        unfinished = f"{self.path(key)}.{os.getpid()}.tmp"
        try:
            os.makedirs(os.path.dirname(unfinished), exist_ok=True)
            with open(unfinished, "wb") as file:
                np.save(file, array)
            os.replace(unfinished, self.path(key))
        except OSError as error:
            raise UserError(f"--cache: {self.folder} can't be written ({error.strerror}); what "
                            "is in it stays, and the same command resumes from it") from None


def files_of_code(name):
    """The files whose code decides what a rival or an attack draws; name: as their tables have it.

    These are the steps, the network, its own file and what that shares with rivals or attacks.
    """
    own = name.rpartition(".")[0]
    used = {getattr(thing, "__module__", None) for thing in vars(import_module(own)).values()}
    shared = sorted(module for module in used
                    if module and module.startswith(("rivals.", "attacks.")))
    paths = [inspect.getsourcefile(import_module(module))
             for module in ("ddpo", "model", own, *shared)]
    return list(dict.fromkeys(paths))


def code_hash(method):
    digest = hashlib.sha256()
    table = {**rivals.GUIDES, **rivals.SAMPLERS, **rivals.BLOCKERS}
    for path in files_of_code(table[rivals.name_of_method(method)]):
        with open(path, "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def latent_keys(file, fingerprint, method, concept, args, shape, world=None):
    """The names (N,) of a file's latents in a Store: hashes of all that a latent depends on.

    fingerprint: Policy.fingerprint's; method, concept: the name that draws, and its words (None
    where it has none); args: steps, eta, guidance; shape: Policy.latent_shape's; world: world_hash,
    of a rival. Another rival's code is no part of it, so that a new one throws nothing away.
    """
    code, keys = code_hash(method), []
    for prompt, seed in zip(file.prompts, file.seeds, strict=True):
        text = [prompt, *prompt.states[1:]] if prompt.states else prompt
        guidance = args.guidance if prompt.guidance is None else prompt.guidance
        parts = [fingerprint, code, method, concept, text, seed, args.steps, args.eta, guidance,
                 shape]
        if world:
            parts += [world, prompt.safe_text]
        keys.append(sha256(parts))
    return keys


def world_hash(world):
    """What a model's world.json names and a rival may look at: pairs, benign prompts, CLIP.

    A CLIP of the hub goes by its name.
    """
    benign = [entry.benign for entry in world.training_files[:1]]
    paths = [world.concept_pairs, world.guard_pairs, *benign, world.clip]
    return sha256([None if path is None else list(hashes([path]).values()) or path
                   for path in paths])


def sha256(thing):
    """The hash of what JSON makes of a thing."""
    return hashlib.sha256(json.dumps(thing).encode()).hexdigest()
