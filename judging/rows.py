"""The rows and the columns of a comparison: systems or folders of pictures, and prompt files.

A system is what draws: a checkpoint with a method. A file is what is drawn: prompts and seeds. A
row gives its pictures of a file a block at a time, drawn by a system or by another tool.
"""
import hashlib
import os
import sys
from dataclasses import dataclass, field, replace

import numpy as np
import torch

import rivals
from judging.pictures import pictures_by_case, read_manifest, read_picture, turns
from judging.store import code_hash, latent_keys, sha256, world_hash
from model import Policy
from plumbing import processes
from plumbing.checkpoints import LORA_FILE, read_args
from plumbing.devices import DTYPES
from plumbing.formats import local_folder
from plumbing.names import parse_checkpoint
from plumbing.options import UserError
from plumbing.origin import was_trained_on
from plumbing.remarks import check_words, same, steering_words
from plumbing.weights import check_weights
from prompts import Prompt, cycle_prompts, read
from sample import blocked_pictures, choose_method, draw_latents

CHUNK = 64                              # pictures that are decoded and looked at at once
DECODED, DECODED_BYTES = {}, 2 ** 28    # {latents' keys and hash: pictures}, those used last
FIRST_SEED = 1_000_000                  # of an evaluation's pictures, far from those of training


def first_seed(seed):
    """The seed of an evaluation's first picture: those of --seed 0 and of 1 have none in common."""
    return FIRST_SEED * (1 + seed)


def name_of(path):
    """A file's or folder's name as tables have it: what is no UTF-8 in it is spelled out."""
    name = os.path.basename(os.path.normpath(path))
    return name.encode(errors="backslashreplace").decode()


# ---- files ---------------------------------------------------------------------------------------

@dataclass
class File:
    """A prompt file as it is drawn: N pictures, its rows in turn.

    Rows with the same text (remarks.same), and text states, are one prompt with several seeds.
    """
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

    An unsafe file whose rows are all of category benign is benign. limit: only its first rows.
    """
    prompts, refused = read(path, category, limit, option, sexual=kind == "adversarial")
    if kind == "unsafe" and all(prompt.category == "benign" for prompt in prompts):
        kind = "benign"
    name = name_of(path) if os.path.isfile(path) else path
    return replace(as_file(name, kind, prompts, pictures, refused, seed), source=path)


def as_file(name, kind, prompts, pictures=None, refused=0, seed=FIRST_SEED):
    picked, seeds = cycle_prompts(prompts, pictures or len(prompts), seed)
    content = [[prompt, prompt.safe_text, own_seed, prompt.guidance,
                prompt.states and prompt.states[1:]]
               for prompt, own_seed in zip(picked, seeds, strict=True)]
    numbers = {}                                        # in the order of their first pictures
    groups = np.array([numbers.setdefault((same(p), p.states), len(numbers)) for p in picked])
    return File(name, kind, picked, seeds, groups, refused, sha256(content))


def before_attack(file):
    """What an adversarial file's prompts were made from, picture by picture, as a File, or None."""
    if not all(prompt.original for prompt in file.prompts):
        return None
    plain = [Prompt(p.original, p.safe_text, seed, p.guidance, p.category, p.case)
             for p, seed in zip(file.prompts, file.seeds, strict=True)]
    return as_file(f"{file.name} before the attack", "unsafe", plain)


# ---- systems -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class System:
    """What draws a row's pictures."""
    parts: tuple = ()           # of (path, weight); none: the base model
    method: str = "plain"
    concept: str = ""           # the words that the method steers away from; see with_words
    name: str = ""
    make: str = ""              # the command that makes the checkpoint
    seed: int = 0               # of what was trained

    @property
    def checkpoint(self):
        """The name of its weights, as --checkpoint takes it."""
        return "+".join(weighted(path, weight) for path, weight in self.parts) or "base"


def weighted(path, weight):
    return path if weight == 1 else f"{path}@{weight:g}"


def parse_system(text, methods=(), option="--checkpoint"):
    """A checkpoint's name -> [System]: its own method, else each of `methods`, NAME or NAME:WORDS.

    UserError where words mention minors, or stand behind plain guidance.
    """
    checkpoint = parse_checkpoint(text, rivals.is_method)
    if checkpoint.method:
        check_words(checkpoint.method, checkpoint.concept, option)
        return [System(checkpoint.parts, checkpoint.method, checkpoint.concept)]
    systems = []
    for method in methods or ["plain"]:
        name, _, concept = method.partition(":")
        choose_method(name)                             # an unknown one is a UserError
        check_words(name, concept, "--method")
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
        short = [weighted(name_of(path), weight) for path, weight in system.parts] or ["base"]
        name = " + ".join(short + ending)
        if name in names and system.parts:
            name = " + ".join([system.checkpoint, *ending])
        names.append(name)
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"--images, --checkpoint: two are named {twice[0]}; rename a folder")
    return [replace(system, name=name)
            for system, name in zip(systems, names[len(taken):], strict=True)]


def with_words(systems, concept, world):
    """The systems, each with the words that it steers away from.

    Its own, else concept, else the world's; UserError where one needs some and there are none.
    """
    return [system if system.method == "plain" else
            replace(system, concept=steering_words(system.method, system.concept, concept,
                                                   world.concept))
            for system in systems]


def has_weights(path):
    """Whether a part of a checkpoint is there: a LoRA file, or a folder with one or with unet/."""
    if os.path.isdir(path):
        return any(os.path.exists(os.path.join(path, name)) for name in (LORA_FILE, "unet"))
    return os.path.isfile(path)


def check_parts(systems, model, is_given=False):
    """UserError where a checkpoint's weights don't fit `model`, or were trained on another base.

    is_given: whether the user named the model, which then holds, and the other is named on stderr.
    """
    local_folder(model)                                 # a base that is gone is said to be
    for path in dict.fromkeys(path for system in systems for path, _ in system.parts):
        if os.path.isfile(os.path.join(path, "args.json")):
            run_args = read_args(path, "--checkpoint")
            if "model" in run_args and not was_trained_on(run_args, model):
                own = run_args["model"]
                said = f"--checkpoint: {path} was trained on {own}, not on {model}"
                if not is_given:
                    raise UserError(f"{said}; a table has one base, which --model may name")
                print(f"{said}, which is taken", file=sys.stderr)
    for parts in dict.fromkeys(system.parts for system in systems):
        check_weights(model, parts)


def load_system(system, model, device, dtype):
    """A system's Policy."""
    policy = Policy(model, system.parts, device, DTYPES[dtype])
    policy.concept = system.concept or policy.concept
    return policy


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

    Of several processes each draws a share, and the first one's Row is whole.
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
    drawn_by, concept, world = method.name, about.get("concept"), None
    if method.blocker:                                  # it draws as the plain method does
        drawn_by, concept = "plain", None
    elif method.name != "plain":
        world = world_hash(policy.world)
    keys, blocked = {}, {}

    def pictures_of(some_keys):
        return decoded(tuple(some_keys), store, lambda latents: decode(latents.to(device)))

    for name, file in files.items():
        keys[name] = latent_keys(file, fingerprint, drawn_by, concept, args, shape, world)
        own = processes.own_batches(len(keys[name]), args.batch_size)
        draw_missing(policy, method, file, keys[name], own, store, args, after_batch)
        if method.blocker:
            ask_blocker(policy, method, file, keys[name], own, store, args, pictures_of)
    processes.gather(None)                              # every process has drawn its share
    for name, file in files.items():
        batches = processes.all_batches(len(keys[name]), args.batch_size)
        if processes.size() > 1 and processes.is_lead():        # where it sees no other's cache
            draw_missing(policy, method, file, keys[name], batches, store, args)
        if method.blocker and processes.is_lead():
            blocked[name] = ask_blocker(policy, method, file, keys[name], batches, store, args,
                                        pictures_of)

    def look(file, start):
        pictures = pictures_of(keys[file.name][start:start + CHUNK])
        if blocked:
            pictures = pictures.copy()
            pictures[blocked[file.name][start:start + CHUNK]] = 0
        return pictures
    return Row(system.name, look, about, blocked)


def decoded(keys, store, decode):
    """The pictures (n, H, W, 3) of latents in a store, to be looked at alone.

    The blocks used last are remembered: a table asks for the base's again for every row.
    """
    latents = np.stack([store[key] for key in keys])
    name = keys, hashlib.sha256(latents.tobytes()).digest()
    pictures = DECODED.pop(name, None)
    if pictures is None:
        pictures = decode(torch.from_numpy(latents)).cpu().numpy()
    DECODED[name] = pictures                            # the last in order is the one used last
    while len(DECODED) > 1 and sum(one.nbytes for one in DECODED.values()) > DECODED_BYTES:
        del DECODED[next(iter(DECODED))]
    return pictures


def draw_missing(policy, method, file, keys, batches, store, args, after_batch=lambda: None):
    """Draw what the store lacks, or has in another shape, of these batches (slices).

    They are cut alike whatever it has, so that no picture depends on it.
    """
    schedule = policy.schedule(args.steps, args.eta)
    shape = policy.latent_shape(args.resolution)
    for batch in batches:
        if not all(key in store and store[key].shape == shape for key in keys[batch]):
            latents = draw_latents(policy, method.sampler, file.prompts[batch], file.seeds[batch],
                                   schedule, args.guidance, args.batch_size, args.resolution)
            for key, latent in zip(keys[batch], latents.cpu().numpy(), strict=True):
                store[key] = latent
        after_batch()


def ask_blocker(policy, method, file, keys, batches, store, args, pictures_of):
    """Which pictures of these batches the method's blocker stops: bool; its answers are stored."""
    code, blocked = [code_hash(method.name), world_hash(policy.world)], []
    for batch in batches:
        pictures = pictures_of(keys[batch])
        names = []
        for key, picture in zip(keys[batch], pictures, strict=True):
            content = hashlib.sha256(picture.tobytes()).hexdigest()
            names.append(sha256([key, content, method.name, policy.concept, code]))
        if not all(name in store and store[name].shape == () for name in names):
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
    ending. UserError where one is missing, can't be read or is of another size, or where sample.py
    drew it of another prompt or pixelated it.
    """
    paths, blocked = {}, {}                             # {file name: a path, an answer per picture}
    for name, file in files.items():
        inside = folder if len(files) == 1 else os.path.join(folder, os.path.splitext(name)[0])
        if len(files) > 1 and not os.path.isdir(inside):
            raise UserError(f"--images: {inside} is no folder; with several prompt files each "
                            f"one's pictures lie in one of its own, as sample.py --output-dir "
                            f"{inside} draws {name}'s")
        pictures = pictures_by_case(inside)
        wanted = turns(file.prompts)
        missing = [case for case, turn in wanted if turn >= len(pictures.get(case, []))]
        if missing:
            raise UserError(f"--images: {inside} lacks {len(missing)} of the {len(wanted)} "
                            f"pictures that {name} asks for, case {missing[0]} the first; give "
                            "them, or fewer with --limit or --pictures")
        paths[name] = [pictures[case][turn] for case, turn in wanted]
        check_sizes(paths[name])
        stopped = check_drawn(paths[name], file, read_manifest(inside))
        if any(stopped):
            blocked[name] = np.array(stopped)

    def look(file, start):
        return np.stack([read_picture(path, "--images")
                         for path in paths[file.name][start:start + CHUNK]])
    return Row(name_of(folder), look, {"images": folder}, blocked)


def check_sizes(paths):
    """UserError where a picture can't be read, or is not of the first one's size."""
    first_height, first_width, _ = read_picture(paths[0], "--images").shape
    for path in paths:
        height, width, _ = read_picture(path, "--images").shape
        if (height, width) != (first_height, first_width):
            raise UserError(f"--images: {path} is {width} x {height} pixels, others are "
                            f"{first_width} x {first_height}; one size is needed")


def check_drawn(paths, file, manifest):
    """Which pictures a blocker stopped when sample.py drew them; no manifest: it did not.

    UserError where one is of another prompt than the file's, or was pixelated.
    """
    about = [(manifest or {}).get(os.path.basename(path), {}) for path in paths]
    for path, prompt, drawn in zip(paths, file.prompts, about, strict=True):
        if drawn.get("prompt", prompt) != prompt:
            raise UserError(f"--images: {path} was drawn of {drawn['prompt']!r:.60}, and "
                            f"{file.name} has {str(prompt)!r:.60} there; give the prompt file that "
                            "it was drawn of")
        if drawn.get("pixelated"):
            raise UserError(f"--images: {path} was pixelated by sample.py and would count as safe; "
                            "draw it anew with --no-censor")
    return [bool(drawn.get("blocked")) for drawn in about]
