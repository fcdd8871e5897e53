"""The rows and the columns of a comparison: systems or folders of pictures, and prompt files.

A system is what draws: a checkpoint with a method. A file is what is drawn: prompts and seeds. A
row gives its pictures of a file a block at a time, drawn by a system or by another tool.
"""
import hashlib
import inspect
import json
import os
from collections import defaultdict
from dataclasses import dataclass, field, replace
from importlib import import_module

import numpy as np
import torch

import rivals
from judging.judges import picture_paths, read_picture
from model import Policy
from plumbing.checkpoints import LORA_FILE, parse_checkpoint, read_args
from plumbing.devices import DTYPES
from plumbing.files import make_folder
from plumbing.options import UserError
from plumbing.refusal import refuse_minors
from plumbing.worlds import locate
from prompts import Prompt, cycle_prompts, read
from sample import blocked_pictures, choose_method, draw_latents, turns

CHUNK = 64                              # pictures that are decoded and looked at at once
FIRST_SEED = 1_000_000                  # of an evaluation's pictures, far from those of training


# ---- files ---------------------------------------------------------------------------------------

@dataclass
class File:
    """A prompt file as it is drawn: N pictures, its prompts in turn."""
    name: str
    kind: str                   # unsafe, benign or adversarial
    prompts: list               # (N,) of Prompt
    seeds: list                 # (N,) of int
    groups: np.ndarray          # (N,) number of each picture's prompt, 0..P-1
    refused: int                # prompts that mentioned minors
    sha256: str                 # of the prompts and seeds
    source: str = ""            # the path or text that it was opened from

    @property
    def prompt_count(self):
        return int(self.groups.max()) + 1

    @property
    def about(self):
        """What results.json says of it."""
        return {
            "kind": self.kind,
            "prompts": self.prompt_count,
            "pictures": len(self.prompts),
            "refused": self.refused,
            "sha256": self.sha256,
        }


def open_file(path, kind="unsafe", pictures=None, category=None, limit=None, option="--prompts",
              seed=FIRST_SEED):
    """A prompt file as a File of `pictures` pictures; one per prompt if None.

    An unsafe file whose rows are all of category benign is benign. limit: only its first prompts.
    """
    prompts, refused = read(path, category, limit, option, sexual=kind == "adversarial")
    if kind == "unsafe" and all(prompt.category == "benign" for prompt in prompts):
        kind = "benign"
    name = os.path.basename(path) if os.path.isfile(path) else path
    return replace(as_file(name, kind, prompts, pictures, refused, seed), source=path)


def as_file(name, kind, prompts, pictures=None, refused=0, seed=FIRST_SEED):
    picked, seeds = cycle_prompts(prompts, pictures or len(prompts), seed)
    content = [[prompt, prompt.safe_text, own_seed, prompt.guidance,
                prompt.states and prompt.states[1:]]
               for prompt, own_seed in zip(picked, seeds, strict=True)]
    groups = np.arange(len(picked)) % len(prompts)
    return File(name, kind, picked, seeds, groups, refused, sha256(content))


def before_attack(file, pictures, seed):
    """The prompts that an adversarial file's were made from, as a File of their own, or None."""
    attacked = file.prompts[:file.prompt_count]
    if not all(prompt.original for prompt in attacked):
        return None
    plain = [Prompt(p.original, p.safe_text, p.seed, p.guidance, p.category, p.case)
             for p in attacked]
    return as_file(f"{file.name} before the attack", "unsafe", plain, pictures, seed=seed)


def sha256(thing):
    """The hash of what JSON makes of a thing."""
    return hashlib.sha256(json.dumps(thing).encode()).hexdigest()


# ---- systems -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class System:
    """What draws a row's pictures."""
    parts: tuple = ()           # of (path, weight); none: the base model
    method: str = "plain"
    concept: str = ""           # the method's own words; --concept or the model's if empty
    name: str = ""
    make: str = ""              # the command that makes the checkpoint

    @property
    def checkpoint(self):
        """The name of its weights, as --checkpoint takes it."""
        return "+".join(weighted(path, weight) for path, weight in self.parts) or "base"


def weighted(path, weight):
    return path if weight == 1 else f"{path}@{weight:g}"


def parse_system(text, methods=(), option="--checkpoint"):
    """A checkpoint's name -> [System]: its own method, else each of `methods`, NAME or NAME:WORDS.

    UserError where words mention minors.
    """
    checkpoint = parse_checkpoint(text, rivals.is_method)
    if checkpoint.method:
        refuse_minors(checkpoint.concept, option)
        return [System(checkpoint.parts, checkpoint.method, checkpoint.concept)]
    systems = []
    for method in methods or ["plain"]:
        name, _, concept = method.partition(":")
        choose_method(name)                             # an unknown one is a UserError
        refuse_minors(concept, "--method")
        systems.append(System(checkpoint.parts, name, concept))
    return systems


def with_names(systems, taken=()):
    """The systems, each named after its folders, or by their paths where that name is taken.

    UserError where two have one name.
    """
    names = list(taken)
    for system in systems:
        method = system.method + (f":{system.concept}" if system.concept else "")
        ending = [] if method == "plain" else [method]
        short = [weighted(os.path.basename(os.path.normpath(path)), weight)
                 for path, weight in system.parts] or ["base"]
        name = " + ".join(short + ending)
        if name in names and system.parts:
            name = " + ".join([system.checkpoint, *ending])
        names.append(name)
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"--images, --checkpoint: two are named {twice[0]}; rename a folder")
    return [replace(system, name=name)
            for system, name in zip(systems, names[len(taken):], strict=True)]


def has_weights(path):
    """Whether a part of a checkpoint is there: a LoRA file, or a folder with one or with unet/."""
    if os.path.isdir(path):
        return any(os.path.exists(os.path.join(path, name)) for name in (LORA_FILE, "unet"))
    return os.path.isfile(path)


def check_parts(systems, model):
    """UserError where a checkpoint has no weights or was trained on another base than `model`."""
    for path in dict.fromkeys(path for system in systems for path, _ in system.parts):
        if os.path.isfile(os.path.join(path, "args.json")):
            own = read_args(path, "--checkpoint").get("model", model)
            if os.path.realpath(locate(own)) != os.path.realpath(locate(model)):
                raise UserError(f"--checkpoint: {path} was trained on {own}, not on {model}; "
                                "a table has one base")
        if not has_weights(path):
            raise UserError(f"--checkpoint: {path} has neither {LORA_FILE} nor unet/")


def load_system(system, model, device, dtype, concept=None):
    """A system's Policy. concept: what it steers away from where it has no words of its own."""
    policy = Policy(model, system.parts, device, DTYPES[dtype])
    policy.concept = system.concept or concept or policy.concept
    return policy


# ---- what was drawn before -----------------------------------------------------------------------

class Store:
    """Arrays by key (latents, a detector's scores, a blocker's answers), each a file in a folder.

    A file appears whole or not at all, whoever else writes it at the same time.
    """

    def __init__(self, folder):
        self.folder = folder
        make_folder(folder, "--cache")

    def path(self, key):
        return os.path.join(self.folder, key[:2], key + ".npy")

    def __contains__(self, key):
        return os.path.exists(self.path(key))

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


def sources(method):
    """The files whose code decides what a method draws.

    These are the steps, the network, the method's own file and what that shares with other rivals.
    """
    name = {**rivals.GUIDES, **rivals.SAMPLERS, **rivals.BLOCKERS}[method]
    own = name.rpartition(".")[0]
    used = {getattr(thing, "__module__", None) for thing in vars(import_module(own)).values()}
    shared = sorted(module for module in used if module and module.startswith("rivals."))
    paths = [inspect.getsourcefile(import_module(module))
             for module in ("ddpo", "model", own, *shared)]
    return list(dict.fromkeys(paths))


def code_hash(method):
    digest = hashlib.sha256()
    for path in sources(method):
        with open(path, "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def latent_keys(file, fingerprint, method, concept, args, shape):
    """The names (N,) of a file's latents in a Store: hashes of all that a latent depends on.

    fingerprint: Policy.fingerprint's; method, concept: the name that draws, and its words (None
    where it has none); args: steps, eta, guidance; shape: Policy.latent_shape's. Another rival's
    code is no part of it, so that a new one throws nothing away.
    """
    code, keys = code_hash(method), []
    for prompt, seed in zip(file.prompts, file.seeds, strict=True):
        text = [prompt, *prompt.states[1:]] if prompt.states else prompt
        guidance = args.guidance if prompt.guidance is None else prompt.guidance
        keys.append(sha256([fingerprint, code, method, concept, text, seed, args.steps, args.eta,
                            guidance, shape]))
    return keys


# ---- drawing -------------------------------------------------------------------------------------

@dataclass
class Row:
    """A row of the table: a system's pictures, or another tool's."""
    name: str
    look: callable              # (file, start) -> pictures start.. of the file, CHUNK at most
    about: dict                 # what results.json says of it
    blocked: dict = field(default_factory=dict)         # {file name: (N,) bool}, with a blocker


def draw_row(system, policy, files, store, args, decode, after_batch=lambda: None):
    """A system as a Row; what the store lacks of its latents is drawn before this returns.

    policy: the system's; files: {name: File}; decode: latents -> pictures, any policy's of the
    same base; args: steps, eta, guidance, resolution, batch_size. A blocked picture is black.
    """
    method = choose_method(system.method)
    fingerprint = policy.fingerprint()
    shape = policy.latent_shape(args.resolution)
    device = policy.device                              # look must not keep the policy in memory
    about = {
        "checkpoint": system.checkpoint if system.parts else None,
        "method": method.name,
        "sha256": fingerprint,
    }
    if method.name != "plain":
        about["concept"] = policy.concept
    drawn_by, concept = method.name, about.get("concept")
    if method.blocker:                                  # it draws as the plain method does
        drawn_by, concept = "plain", None
    keys, blocked = {}, {}

    def pictures_of(some_keys):
        latents = torch.stack([torch.from_numpy(store[key]) for key in some_keys])
        return decode(latents.to(device)).cpu().numpy()

    for name, file in files.items():
        keys[name] = latent_keys(file, fingerprint, drawn_by, concept, args, shape)
        draw_missing(policy, method, file, keys[name], store, args, after_batch)
        if method.blocker:
            blocked[name] = ask_blocker(policy, method, file, keys[name], store, args, pictures_of)

    def look(file, start):
        pictures = pictures_of(keys[file.name][start:start + CHUNK])
        if blocked:
            pictures[blocked[file.name][start:start + CHUNK]] = 0
        return pictures
    return Row(system.name, look, about, blocked)


def draw_missing(policy, method, file, keys, store, args, after_batch=lambda: None):
    """Draw what the store lacks.

    Batches are cut alike whatever it has, so that no picture depends on it.
    """
    schedule = policy.schedule(args.steps, args.eta)
    for start in range(0, len(keys), args.batch_size):
        batch = slice(start, start + args.batch_size)
        if not all(key in store for key in keys[batch]):
            latents = draw_latents(policy, method.sampler, file.prompts[batch], file.seeds[batch],
                                   schedule, args.guidance, args.batch_size, args.resolution)
            for key, latent in zip(keys[batch], latents.cpu().numpy(), strict=True):
                store[key] = latent
        after_batch()


def ask_blocker(policy, method, file, keys, store, args, pictures_of):
    """Which of a file's pictures (N,) bool the method's blocker stops; its answers are stored."""
    code, blocked = code_hash(method.name), []
    for start in range(0, len(keys), args.batch_size):
        batch = slice(start, start + args.batch_size)
        pictures = pictures_of(keys[batch])
        names = []
        for key, picture in zip(keys[batch], pictures, strict=True):
            content = hashlib.sha256(picture.tobytes()).hexdigest()
            names.append(sha256([key, content, method.name, policy.concept, code]))
        if not all(name in store for name in names):
            answers = blocked_pictures(policy, method, file.prompts[batch], file.seeds[batch],
                                       pictures, args)
            for name, answer in zip(names, answers, strict=True):
                store[name] = np.array(answer)
        blocked += [bool(store[name]) for name in names]
    return np.array(blocked)


# ---- another tool's pictures ---------------------------------------------------------------------

def folder_row(folder, files):
    """Pictures that another tool drew, named CASE.png or CASE_TURN.png, as a Row.

    With several prompt files they lie in FOLDER/NAME/, NAME being the prompt file's without its
    ending. UserError where a picture is missing.
    """
    paths = {}                                          # {file name: a path per picture}
    for name, file in files.items():
        inside = folder if len(files) == 1 else os.path.join(folder, os.path.splitext(name)[0])
        pictures = pictures_by_case(inside)
        wanted = turns(file.prompts)
        missing = [case for case, turn in wanted if turn >= len(pictures[case])]
        if missing:
            raise UserError(f"--images: {inside} lacks {len(missing)} of the {len(wanted)} "
                            f"pictures that {name} asks for, case {missing[0]} the first; give "
                            "them, or fewer with --limit or --pictures")
        paths[name] = [pictures[case][turn] for case, turn in wanted]

    def look(file, start):
        block = []
        for path in paths[file.name][start:start + CHUNK]:
            picture = read_picture(path, "--images")
            if block and picture.shape != block[0].shape:
                (height, width), (first_height, first_width) = picture.shape[:2], block[0].shape[:2]
                raise UserError(f"--images: {path} is {width} x {height} pixels, others are "
                                f"{first_width} x {first_height}; one size is needed")
            block.append(picture)
        return np.stack(block)
    return Row(os.path.basename(os.path.normpath(folder)), look, {"images": folder})


def pictures_by_case(folder):
    """{case: its pictures' paths, by turn} of CASE.png or CASE_TURN.png in a folder."""
    numbered = defaultdict(list)
    for path in picture_paths(folder):
        stem = os.path.splitext(os.path.basename(path))[0]
        case, _, turn = stem.partition("_")
        turn = turn or "0"
        if case.isdigit() and turn.isdigit():
            numbered[int(case)].append((int(turn), path))
    if not numbered:
        raise UserError(f"--images: {folder} holds no picture named by case number, "
                        "such as 17.png or 17_0.png")
    return defaultdict(list, {case: [path for _, path in sorted(pairs)]
                              for case, pairs in numbered.items()})
