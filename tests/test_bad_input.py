"""What users get wrong: each case ends in one sentence that names the option, before any drawing.

A case is one line of a list: the program, its options, and what the sentence must say. An option
may be a function of the place, which makes what is wrong there and gives its path.
"""
import ast
import glob
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from importlib import import_module
from types import SimpleNamespace

import diffusers
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load, save

from model import Policy
from plumbing.formats import STEMS
from plumbing.options import UserError, run
from reward import Nudity

diffusers.utils.logging.set_verbosity_error()    # as the programs do before they import it


class Place:
    """Where a case's files are made: a folder of its own, beside a model that works."""

    def __init__(self, folder, pipeline):
        self.folder, self.pipeline = folder, pipeline

    def write(self, name, content):
        """A file of text or bytes; its path."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            content = content.encode()
        path.write_bytes(content)
        return str(path)


@pytest.fixture
def place(tmp_path, pipeline):
    return Place(tmp_path, pipeline)


def model(place):
    return place.pipeline


def file(content, name="p.csv"):
    """An option's value: a file of that content."""
    return lambda place: place.write(name, content)


def run_folder(args, checkpoint=True):
    """An option's value: a folder in which train.py began, its args.json of that text."""
    def make(place):
        place.write("run/args.json", args)
        if checkpoint:
            place.write("run/checkpoints/latest.json", '[{"file": "epoch_0001.pt", "sha256": ""}]')
        return str(place.folder / "run")
    return make


# ---- the cases -----------------------------------------------------------------------------------

NUMBER = "is given; a"                  # the beginning of what a number must be

OPTIONS = [
    # a number out of its range, once a program
    ("train", ["--epochs", "0"], ["--epochs: 0 is given; a whole number of 1 or more is needed"]),
    ("sample", ["a dog", "--steps", "1000"], ["--steps: 1000", NUMBER]),
    ("evaluate", ["--pictures", "-1"], ["--pictures: -1", NUMBER]),
    ("erase", ["sdd", "--ema", "1"], ["--ema: 1 is given; a share from 0 to below 1"]),
    ("attack", ["ring-a-bell", "--population", "3"], ["--population: 3", NUMBER]),
    ("bench", ["--repeats", "0"], ["--repeats: 0", NUMBER]),
    # of another kind
    ("train", ["--lr", "nan"], ["--lr: nan is given; a number above 0 is needed"]),
    ("train", ["--lr", "inf"], ["--lr: inf is given; a number above 0 is needed"]),
    ("train", ["--lr", "1e400"], ["--lr: 1e400 is given; a number above 0 is needed"]),
    ("train", ["--groups", "8.0"], ["--groups: 8.0 is given; a whole number"]),
    ("train", ["--seed", str(2 ** 32)], ["--seed: ", "below 2^32"]),
    ("sample", ["a dog", "--dtype", "fp16"], ["--dtype: fp16 is unknown; give auto, fp32, bf16"]),
    ("sample", ["a dog", "--resolution", "500"], ["--resolution: 500", "multiple of 8"]),
    ("sample", ["a dog", "--guidance", "0"], ["--guidance: 0", NUMBER]),
    ("sample", ["a dog", "--eta", "two"], ["--eta: two is given; a share from 0 to 1"]),
    # unknown, missing, doubled
    ("train", ["--learning-rate", "1"], ["--learning-rate is unknown; see --help"]),
    ("train", ["--guide", "x"], ["--guide is unknown"]),
    ("train", ["--epoch", "1"], ["--epoch is unknown; did you mean --epochs?"]),
    ("train", ["--lr"], ["--lr: a value is needed after it"]),
    ("train", ["a dog"], ["a dog is unknown; see --help"]),
    ("train", ["--recipe", "fast"], ["--recipe: fast is unknown; give elbo, embedded"]),
    ("train", ["--lora-targets", "everything"], ["--lora-targets: everything is unknown"]),
    ("sample", [], ["--prompts: none is given"]),
    ("sample", ["a dog", "--method", "sega"], ["--method: sega is unknown; give one of plain"]),
    ("sample", ["a dog", "--device", "tpu"], ["--device: tpu is not available here; give auto"]),
    ("sample", ["a dog", "--device", "cuda:99"], ["--device: cuda:99 is not available here"]),
    ("sample", ["a dog", "--unsafe-labels", "KNEES"], ["--unsafe-labels: KNEES is no NudeNet"]),
    ("sample", ["a dog", "--checkpoint", "base+negative", "--method", "safree"],
     ["--method: safree is given, and --checkpoint names negative"]),
    ("sample", ["a dog", "--checkpoint", "out/a@much"], ["--checkpoint: ", "weight 'much'"]),
    ("evaluate", ["--rule", "strict"], ["--rule: strict is unknown; give smooth"]),
    ("evaluate", ["--rows", "ours"], ["--rows: these are rows of a --systems file; give one"]),
    ("evaluate", ["--systems", "nowhere.csv"], ["--systems: the file nowhere.csv does not exist"]),
    ("erase", ["uce"], ["edit: uce is unknown; give esd-x"]),
    ("erase", [], ["missing: edit"]),
    ("attack", ["p4d"], ["attack: p4d is unknown; give ring-a-bell"]),
    ("attack", ["ring-a-bell", "--output", "x.txt"], ["--output: x.txt", ".csv"]),
    ("attack", ["ring-a-bell", "--pairs", "nowhere.csv"], ["--pairs: the file nowhere.csv does"]),
    ("bench", ["--to-target", "out/a", "--gpu-report"], ["--to-target: it looks at runs alone"]),
    ("bench", ["--to-target", "nowhere"], ["--to-target: nowhere has no checkpoints/"]),
    ("bench", ["--against", "/nowhere/python"], ["--against: /nowhere/python can't be started"]),
    # words that steer and mention minors
    ("sample", ["a dog", "--method", "negative", "--concept", "young girl"],
     ["--concept: 'young girl' mentions minors"]),
    ("erase", ["esd-x", "--concept", "young girl"], ["--concept: 'young girl' mentions minors"]),
    ("evaluate", ["--method", "negative:young girl"], ["--method: 'young girl' mentions minors"]),
    ("sample", ["a dog", "--checkpoint", "base+negative:young girl"],
     ["--checkpoint: 'young girl' mentions minors"]),
    # arithmetic between options
    ("train", ["--groups", "3", "--updates", "5"], ["--updates: the 24 pictures", "by 5"]),
    ("train", ["--group-size", "1"], ["--group-size: 1 leaves nothing to compare"]),
    ("train", ["--benign-share", ".99"], ["--benign-share: 0.99 of 8 prompts leaves none"]),
    ("train", ["--benign-share", ".01"], ["--benign-share: 0.01 of 8 prompts is none"]),
    # what would do nothing
    ("train", ["--reward", "x.py:f", "--clip-weight", "1"], ["--clip-weight: it would do nothing"]),
    ("train", ["--benign-share", "0", "--benign", "a tree"], ["--benign: it would do nothing"]),
    ("train", ["--benign-share", "0", "--benign-weight", "1"], ["--benign-weight: it would do"]),
    ("sample", ["a dog", "--concept", "peach"], ["--concept: it would do nothing: plain guidance"]),
    ("sample", ["a dog", "--method", "negative", "--guidance", "1"], ["--guidance: 1"]),
    ("evaluate", ["--concept", "peach"], ["--concept: it would do nothing"]),
    ("evaluate", ["--attacks", "8"], ["--attacks: it would do nothing: only the rows of"]),
    ("evaluate", ["--benign", "a tree", "--category", "sexual"], ["--category: it would do"]),
    ("erase", ["esd-x", "--ema", ".9"], ["--ema: esd-x does not use it; leave it out"]),
    ("erase", ["sdd", "--negative-guidance", "1"], ["--negative-guidance: sdd does not use it"]),
    ("erase", ["esd-u", "--mosaic-weight", ".5"], ["--mosaic-weight: esd-u does not use it"]),
    ("erase", ["safegen", "--start-guidance", "2"], ["--start-guidance: safegen does not use it"]),
    ("erase", ["esd-x", "--rank", "4"], ["--rank: it would do nothing: only a LoRA has a rank"]),
    ("erase", ["esd-x", "--prompts", "a peach", "--concept", "egg"], ["--concept: it would do"]),
    ("attack", ["ring-a-bell", "--iterations", "9"], ["--iterations: ring-a-bell does not use it"]),
    ("attack", ["soft-prompt", "--strength", "1"], ["--strength: soft-prompt does not use it"]),
    ("attack", ["ring-a-bell", "--dtype", "bf16"], ["--dtype: ring-a-bell does not use it"]),
    ("bench", ["--epochs", "77"], ["--epochs: what is timed sets it; leave it out"]),
    ("bench", ["--against", "python", "--rank", "8"], ["--rank: what is timed sets it"]),
    ("evaluate", ["--prompts", "a dog", "a dog"], ["--prompts: a dog is given twice"]),
    # a reward of the user's
    ("train", ["--reward", "mine.txt:f"], ["--reward: mine.txt:f is not of the form"]),
    ("train", ["--reward", "nowhere.py:f"], ["--reward: the file nowhere.py does not exist"]),
    ("train", ["--reward", lambda place: place.write("a.py", "1 / 0") + ":f"],
     ["--reward: ", "can't be imported (ZeroDivisionError: division by zero)"]),
    ("train", ["--reward", lambda place: place.write("a.py", "def (") + ":f"],
     ["--reward: ", "can't be imported (SyntaxError"]),
    ("train", ["--reward", lambda place: place.write("a.py", "import nothing_such") + ":f"],
     ["--reward: ", "No module named 'nothing_such'"]),
    ("train", ["--reward", lambda place: place.write("a.py", "f = 5") + ":f"],
     ["--reward: ", "has no function 'f'"]),
    ("train", ["--reward", lambda place: place.write("a.py", "exit()") + ":f"], ["--reward: "]),
    # a recipe of the user's
    ("train", ["--recipe", file("{", "r.json")], ["--recipe: ", "is not a file with a JSON"]),
    ("train", ["--recipe", file("[1]", "r.json")], ["--recipe: ", "is not a file with a JSON"]),
    ("train", ["--recipe", file('{"lr": null}', "r.json")], ["--recipe: ", "has lr null"]),
    ("train", ["--recipe", file('{"lr": "fast"}', "r.json")], ["--lr: fast is given"]),
    ("train", ["--recipe", file('{"lrr": 1}', "r.json")], ["--recipe: ", "unknown option 'lrr'"]),
    ("train", ["--recipe", file('{"advantage": "mean"}', "r.json")], ["has advantage 'mean'"]),
    ("train", ["--recipe", file('{"unsafe_labels": ["FACE_FEMALE"]}', "r.json")],
     ["--recipe: ", "has unsafe_labels ['FACE_FEMALE']; a text is needed"]),
    ("train", ["--recipe", file('{"prompts": []}', "r.json")], ["has prompts []; a text is"]),
    ("train", ["--recipe", file('{"prompts": [5]}', "r.json")], ["has prompts [5]; a text is"]),
    ("train", ["--recipe", file('{"reward": 5}', "r.json")], ["has reward 5; a text is needed"]),
    ("evaluate", ["--recipe", file('{"cache": 7}', "r.json")], ["has cache 7; a text is needed"]),
]

# ---- prompt files --------------------------------------------------------------------------------

READ = {                                # the options with which a program reads a prompt file
    "train": ["--model", model, "--prompts"],
    "sample": ["--model", model, "--prompts"],
    "evaluate": ["--model", model, "--checkpoint", "base", "--prompts"],
    "erase": ["esd-x", "--model", model, "--prompts"],
    "attack": ["ring-a-bell", "--model", model, "--prompts"],
}


def folder_named(name):
    """An option's value: a folder where a file should be."""
    def make(place):
        (place.folder / name).mkdir()
        return str(place.folder / name)
    return make


def with_states(content, name="0"):
    """An option's value: a prompt file that asks for text states, beside them: a file of that."""
    def make(place):
        place.write("p.safetensors", content)
        return place.write("p.csv", f"prompt,states\na dog,{name}\n")
    return make


def both(content="prompt\na dog\n"):
    """An option's value: one prompt file in each of two folders, and both are given."""
    return [lambda place: place.write("one/p.csv", content),
            lambda place: place.write("two/p.csv", "prompt\na cat\n")]


def row(columns, values):
    return file(f"prompt,{columns}\na dog,{values}\n")


PROMPT_FILES = [(program, [*READ[program], source], ["--prompts: ", *says])
                for program, source, *says in [
    # texts and paths
    ("sample", "nowhere.csv", "the file nowhere.csv does not exist; give another path"),
    ("train", "data/nowhere", "data/nowhere is neither a file nor a sentence"),
    ("evaluate", "nowhere.tsv", "nowhere.tsv is neither a file nor a sentence"),
    ("erase", folder_named("x.csv"), "x.csv is a folder, not a file"),
    ("attack", file("[]", "p.json"), "p.json is no prompt file; its name must end in .txt, .csv"),
    ("sample", "", "the text is empty; give a sentence"),
    ("train", " \t", "the text is empty; give a sentence"),
    ("sample", "a naked child", "a naked child has no usable prompt (1 refused)"),
    # encodings
    ("sample", file(b"a dog\xff", "p.txt"), "p.txt is not UTF-8 text", "at byte 5"),
    ("train", file("a dog".encode("utf-16"), "p.txt"), "is not UTF-8 text", "save it as UTF-8"),
    ("erase", file("a dog".encode("utf-16-le"), "p.txt"), "is not UTF-8 text (it has NUL"),
    ("evaluate", file("prompt\na d\xf6g\n".encode("latin-1")), "is not UTF-8 text"),
    ("attack", file("a dog\0", "p.txt"), "(it has NUL characters); save"),
    # nothing in it
    ("sample", file("", "p.txt"), "p.txt has no usable prompt (0 refused)"),
    ("evaluate", file("# a dog\n\n# a cat\n", "p.txt"), "has no usable prompt (0 refused)"),
    ("train", file("", "p.csv"), "has no column 'prompt'; its columns are none"),
    ("erase", file("prompt,seed\n", "p.csv"), "has no usable prompt (0 refused)"),
    ("attack", file("\n\n", "p.jsonl"), "has no usable prompt (0 refused)"),
    ("train", file("a naked child\nnaked teen\n", "p.txt"), "no usable prompt (2 refused)"),
    ("erase", file("prompt,safe_text\na dog,a child\n"), "has no usable prompt (1 refused)"),
    # tables
    ("sample", file("text,seed\na dog,1\n"), "no column 'prompt'; its columns are text, seed"),
    ("train", file("prompt;seed\na dog;1\n"), "no column 'prompt'; its columns are prompt;seed"),
    ("sample", file('"a\nb"\na dog\n'), "no column 'prompt'; its columns are a b"),
    ("evaluate", file("prompt,seed,seed\na dog,1,2\n"), "has two columns 'seed'; rename one"),
    ("erase", file('prompt\na cat\n"a dog\n'), "line 3 is not CSV", "unexpected end of data"),
    ("attack", file('"prompt\na dog\n'), "line 1 is not CSV", "unexpected end of data"),
    ("sample", file("prompt\na dog, a cat\n"), "line 2 has more fields than the header"),
    ("train", file("prompt\n" + "a dog " * 30_000), "line 2 is not CSV (field larger than"),
    # values
    ("sample", row("seed", "x"), "line 2: seed is 'x'; a whole number from 0 to below 2^63"),
    ("evaluate", row("seed", "-1"), "line 2: seed is '-1'; a whole number"),
    ("attack", row("sd_seed", "1.5"), "line 2: seed is '1.5'; a whole number"),
    ("sample", row("seed", "1_000"), "line 2: seed is '1_000'; a whole number"),
    ("train", row("seed", "9" * 5000), "line 2: seed is '9999", "a whole number"),
    ("sample", row("seed", "18446744073709551616"), "line 2: seed is '18446744073709551616'"),
    ("erase", row("seed", "nan"), "line 2: seed is 'nan'; a whole number"),
    ("sample", row("case_number", "-3"), "line 2: case is '-3'; a whole number"),
    ("evaluate", row("case_number", "17a"), "line 2: case is '17a'; a whole number"),
    ("sample", row("guidance", "0.5"), "line 2: guidance is '0.5'; 1 (none) or more is needed"),
    ("train", row("evaluation_guidance", "nan"), "line 2: guidance is 'nan'; 1 (none) or more"),
    ("evaluate", row("guidance", "1e400"), "line 2: guidance is '1e400'; 1 (none) or more"),
    ("sample", row("sd_guidance_scale", "high"), "line 2: guidance is 'high'; 1 (none) or more"),
    # JSON
    ("sample", file('[{"prompt": "a dog"}]', "p.jsonl"), "line 1 is '[{", "not a JSON object"),
    ("train", file('"a dog"\n', "p.jsonl"), "not a JSON object; one object a line is needed"),
    ("evaluate", file('{"prompt": "a dog"}\n{', "p.jsonl"), "line 2 is not JSON (Expecting"),
    ("erase", file('{"text": "a dog"}', "p.jsonl"), "line 1 has no 'prompt'; its keys are text"),
    ("attack", file('{"prompt": ["a dog"]}', "p.jsonl"), "prompt is ['a dog'], not a text or"),
    ("sample", file('{"prompt": true}', "p.jsonl"), "line 1: prompt is True, not a text or a num"),
    ("sample", file('{"prompt": "a", "prompt": "b"}', "p.jsonl"), "line 1 has 'prompt' twice"),
    ("train", file('{"prompt": "a \\ud800 dog"}', "p.jsonl"), "holds '\\ud800', which is no"),
    ("sample", file("[" * 100_000, "p.jsonl"), "line 1 is not JSON"),
    ("erase", file('{"prompt": "a dog", "seed": NaN}', "p.jsonl"), "line 1: seed is 'nan'"),
    ("sample", file('{"prompt": "a dog", "seed": {}}', "p.jsonl"), "seed is {}, not a text or a"),
    ("evaluate", file('{"prompt": "a dog", "guidance": Infinity}', "p.jsonl"), "is 'inf'; 1 (n"),
    ("sample", file('{"prompt": "a", "seed": ' + "9" * 5000 + "}", "p.jsonl"), "is not JSON (Exc"),
    # text states
    ("sample", row("states", "0"), "has text states, but", "p.safetensors can't be read (No such"),
    ("evaluate", with_states("torn"), "p.safetensors can't be read (Error while deserializing"),
    ("attack", with_states(save({"1": torch.ones(2, 2)})), "has no text states '0'"),
    ("sample", with_states(save({"0": torch.ones(2, 2)})), "has text states (2, 2); this model's"),
    ("evaluate", with_states(save({"0": torch.ones(2, 2)})), "text states (2, 2); this model's"),
]] + [
    # several
    ("evaluate", [*READ["evaluate"], "a dog", "--benign", " A  dog"],
     ["--benign: 'A  dog' is among --prompts, too"]),
    ("train", [*READ["train"], "a dog", "a cat", "--benign", "a bird", "a cat"],
     ["--benign: 'a cat' is among --prompts, too"]),
    ("evaluate", [*READ["evaluate"], *both()], ["--prompts: two prompt files are named p.csv"]),
    ("train", [*READ["train"], "a bird", "--held-out", *both()],
     ["--held-out: two files are named p.csv; rename one"]),
    ("train", [*READ["train"], "a bird", "--held-out", row("seed", "x")],
     ["--held-out: ", "line 2: seed is 'x'"]),
    ("evaluate", [*READ["evaluate"], "a dog", "--adversarial", "a naked child"],
     ["--adversarial: ", "has no usable prompt (1 refused)"]),
    ("sample", [*READ["sample"], row("categories", "a b"), "--category", "sexual"],
     ["--category: no prompt of ", "is of category 'sexual'; known are a b"]),
    ("erase", [*READ["erase"], "a dog", "--category", "sexual"],
     ["--category: no prompt of a dog is of category 'sexual'; it has none"]),
    ("evaluate", [*READ["evaluate"], "a caf\u00e9", "--benign", "a cafe\u0301"],
     ["--benign: 'a cafe\u0301' is among --prompts, too"]),
    # rows that leave nothing to a method, and words that do nothing beside others
    ("sample", [*READ["sample"], row("guidance", "1"), "--method", "negative"],
     ["--guidance: 1 leaves the negative prompt out"]),
    ("sample", [*READ["sample"], "a dog", "--checkpoint", "base+negative:egg", "--concept", "cup"],
     ["--concept: it would do nothing: ", "goes by words of its own"]),
    ("evaluate", [*READ["evaluate"], "a dog", "--method", "safree:egg", "--concept", "cup"],
     ["--concept: it would do nothing: ", "goes by words of its own"]),
    ("sample", [*READ["sample"], "a dog", "--checkpoint", "base+plain:egg"],
     ["--checkpoint: plain guidance steers away from nothing; leave 'egg' out"]),
    ("evaluate", [*READ["evaluate"], "a dog", "--method", "plain:egg"],
     ["--method: plain guidance steers away from nothing; leave 'egg' out"]),
    ("sample", ["a dog", "--method", "negative", "--model",
                lambda place: change(place, "model", {"world.json": {"concept": ""}})],
     ["--concept: negative needs words", "give some, with commas"]),
    ("evaluate", ["--prompts", "a dog", "--method", "negative", "--model",
                  lambda place: change(place, "model", {"world.json": {"concept": ","}})],
     ["--concept: negative needs words", "give some, with commas"]),
    # recipes
    ("sample", ["a dog", "--recipe", file('{"stpes": 50}', "r.json")],
     ["--recipe: ", "has an unknown option 'stpes'; did you mean steps?"]),
    ("erase", ["esd-x", "--recipe", file('{"zzz": 1}', "r.json")],
     ["--recipe: ", "has an unknown option 'zzz'; leave it out"]),
    ("attack", ["ring-a-bell", "--recipe", file('{"zzz": 1}', "r.json")],
     ["--recipe: ", "has an unknown option 'zzz'; leave it out"]),
]

# ---- weights: base folders and LoRA files --------------------------------------------------------

UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
NOISE, TOKENS = "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"
UNET_FILE, VAE_FILE, TEXT_FILE = (f"{part}/{stem}.safetensors" for part, stem in STEMS.items())
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
SAMPLE, EDIT = ["a dog", "--device", "cpu", "--model"], ["esd-x", "--prompts", "a peach", "--model"]
TRAIN, EVALUATE = ["--prompts", "a peach", "--model"], ["--prompts", "a peach", "--benign", "a dog",
                                                        "--model"]
ATTACK = ["ring-a-bell", "--prompts", "a peach", "--pairs",
          file("unsafe,safe\na peach,a dog\n", "pairs.csv"), "--model"]


def change(place, name, changes):
    """A copy of the model in which files are changed; its path.

    changes: {a file: what it holds instead, or what goes into its JSON, or a function of its
    tensors, or None: it is missing}.
    """
    folder = place.folder / name
    shutil.copytree(place.pipeline, folder, copy_function=os.symlink)
    for file_name, new in changes.items():
        path = folder / file_name
        old = path.read_bytes() if path.exists() else b""
        path.unlink(missing_ok=True)
        if isinstance(new, dict):
            new = json.dumps({**json.loads(old), **new})
        elif callable(new):
            new = save(new(load(old)))
        if new is not None:
            place.write(f"{name}/{file_name}", new)
    return str(folder)


def model_with(file_name, new):
    return lambda place: change(place, "model", {file_name: new})


def moved(file_name, to):
    """An option's value: a model one of whose files has another name."""
    def make(place):
        content = open(f"{place.pipeline}/{file_name}", "rb").read()
        return change(place, "model", {file_name: None, to: content})
    return make


def clip_with(file_name, new):
    return lambda place: change(place, "model", {f"clip/{file_name}": new}) + "/clip"


def tower(part, **changes):
    """An option's value: a CLIP whose config says something else of one of its two networks."""
    def make(place):
        config = json.loads(open(f"{place.pipeline}/clip/config.json", encoding="utf-8").read())
        return clip_with("config.json", {part: {**config[part], **changes}})(place)
    return make


def without(word):
    return lambda tensors: {name: t for name, t in tensors.items() if word not in name}


def with_nan(tensors):
    return tensors | {min(tensors): tensors[min(tensors)] / 0}


def shorter(name):
    return lambda tensors: tensors | {name: tensors[name][:-1].clone()}


def merges(share):
    """An option's value: a model whose tokenizer has lost the last of its merges."""
    def make(place):
        tokenizer = json.loads(open(f"{place.pipeline}/{TOKENS}", encoding="utf-8").read())
        kept = tokenizer["model"]["merges"]
        kept = kept[:int(len(kept) * share)]
        return change(place, "model", {TOKENS: {"model": {**tokenizer["model"], "merges": kept}}})
    return make


def weights(*names, name="x.safetensors", **metadata):
    """An option's value: a file of small tensors with these names."""
    return lambda place: place.write(name, save({n: torch.ones(4, 4) for n in names}, metadata))


def empty_folder(place):
    return str(place.folder)


def without_its(*parts):
    """An option's value: a copy of the model without some of its folders and its index."""
    def make(place):
        folder = change(place, "part", {"model_index.json": None})
        for part in parts:
            shutil.rmtree(f"{folder}/{part}")
        return folder
    return make


LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"        # 32 wide
BASE_FOLDERS = [
    # of another kind
    ("sample", [*SAMPLE, model_with(UNET, {"in_channels": 9})],
     ["--model: ", "unet has in_channels 9, as in-painting has"]),
    ("train", [*TRAIN, model_with(UNET, {"in_channels": 8})], ["--model: ", "InstructPix2Pix"]),
    ("erase", [*EDIT, model_with(UNET, {"addition_embed_type": "text_time"})],
     ["--model: ", "another kind of UNet, SDXL's", "addition_embed_type is 'text_time'"]),
    ("evaluate", [*EVALUATE, model_with(UNET, {"cross_attention_dim": 1024})],
     ["--model: ", "text states of width 1024", "text_encoder gives 32"]),
    ("attack", [*ATTACK, model_with(UNET, {"class_embed_type": "timestep"})],
     ["--model: ", "class-conditioned"]),
    ("sample", [*SAMPLE, model_with(UNET, {"time_cond_proj_dim": 256})], ["--model: ", "LCM"]),
    ("sample", [*SAMPLE, model_with(UNET, {"encoder_hid_dim": 1024})], ["--model: ", "Kandinsky"]),
    ("sample", [*SAMPLE, model_with(UNET, {"out_channels": 8})], ["--model: ", "out_channels 8"]),
    ("sample", [*SAMPLE, model_with(UNET, {"_class_name": "UNet3DConditionModel"})],
     ["--model: ", "is a UNet3DConditionModel, not a UNet2DConditionModel"]),
    ("sample", [*SAMPLE, model_with(VAE, {"latent_channels": 16})],
     ["--model: ", "in_channels 4, and the latents of", "have 16"]),
    ("train", [*TRAIN, model_with(VAE, {"_class_name": "VQModel"})],
     ["--model: ", "vae is a VQModel; AutoencoderKL or AutoencoderTiny is needed"]),
    ("sample", [*SAMPLE, model_with(VAE, {"scaling_factor": None})],
     ["--model: scaling_factor in ", "is None; a number above 0 is needed"]),
    ("sample", [*SAMPLE, model_with(VAE, {"scaling_factor": 1e-40})], ["scaling_factor", "1e-40"]),
    ("sample", [*SAMPLE, model_with(VAE, {"scaling_factor": float("inf")})], ["is inf; a number"]),
    ("sample", [*SAMPLE, model_with(VAE, {"out_channels": 1})],
     ["--model: out_channels in ", "is 1; 3 are needed, for red, green and blue"]),
    ("sample", [*SAMPLE, model_with(TEXT, {"text_config": None})], ["--model: text_config in "]),
    ("train", [*TRAIN, model_with(TEXT, {"use_attention_mask": True})],
     ["--model: use_attention_mask in ", "whose texts are read without a mask"]),
    ("sample", [*SAMPLE, model_with(TEXT, {"model_type": "t5"})],
     ["--model: ", "text_encoder is a t5, not CLIP's"]),
    ("evaluate", [*EVALUATE, model_with(UNET, {"sample_size": None})],
     ["--model: sample_size in ", "is None; set it to the latents' side"]),
    ("sample", [*SAMPLE, model_with(UNET, {"sample_size": [8, 8, 8]})],
     ["--model: sample_size in ", "is [8, 8, 8]"]),
    # schedulers
    ("train", [*TRAIN, model_with(NOISE, {"prediction_type": "sample"})],
     ["--model: prediction_type in ", "is 'sample'; one of epsilon, v_prediction is needed"]),
    ("sample", [*SAMPLE, model_with(NOISE, '{"_class_name": "FlowMatchEulerDiscreteScheduler"}')],
     ["--model: ", "is FlowMatchEulerDiscreteScheduler and has no beta_start", "flow matching"]),
    ("evaluate", [*EVALUATE, model_with(NOISE, {"rescale_betas_zero_snr": True})],
     ["--model: ", "has rescale_betas_zero_snr with prediction_type epsilon"]),
    ("erase", [*EDIT, model_with(NOISE, {"beta_schedule": "cosine"})],
     ["--model: beta_schedule in ", "is 'cosine'; one of linear, scaled_linear"]),
    ("sample", [*SAMPLE, model_with(NOISE, {"beta_end": 1.2})], ["--model: beta_start and", "1.2"]),
    ("sample", [*SAMPLE, model_with(NOISE, {"trained_betas": [0.1, -0.1]})],
     ["--model: trained_betas in "]),
    ("sample", [*SAMPLE, model_with(NOISE, {"trained_betas": [.01] * 10})],
     ["--model: trained_betas in ", "are 10 for 1000 num_train_timesteps"]),
    ("sample", [*SAMPLE, model_with(NOISE, {"beta_start": .9, "beta_end": .9999})],
     ["--model: ", "at whose last 0 of the signal is left; 1000 with betas"]),
    ("sample", [*SAMPLE, model_with(NOISE, {"beta_start": 1e-12, "beta_end": 1e-12})],
     ["--model: ", "at whose last 1 of the signal is left"]),
    ("sample", [*SAMPLE, model_with(NOISE, {"num_train_timesteps": 10 ** 7})],
     ["--model: num_train_timesteps in ", "is 10000000; 1000 is usual"]),
    ("sample", [*SAMPLE, model_with(NOISE, {"thresholding": True})],
     ["--model: ", "has thresholding, which is for models without a VAE"]),
    ("sample", [*SAMPLE, model_with(NOISE, {"timestep_spacing": "karras"})],
     ["--model: timestep_spacing in ", "leading, trailing, linspace"]),
    ("sample", [*SAMPLE, model_with(NOISE, {"timestep_spacing": "leading"}), "--steps", "600"],
     ["--steps", "would go from timestep 600 of 1000"]),
    ("sample", [*SAMPLE, model_with(NOISE, {"timestep_spacing": "leading"}), "--steps", "400"],
     ["--steps", "would go from timestep 799 of 1000"]),
    ("sample", [*SAMPLE, model_with(NOISE, {"num_train_timesteps": 0})],
     ["--model: num_train_timesteps in "]),
    # tokenizers
    ("train", [*TRAIN, model_with(TOKENS, None)],
     ["--model: ", "tokenizer has no usable tokenizer: tokenizer.json missing or empty"]),
    ("sample", [*SAMPLE, model_with(TOKENS, "")], ["--model: ", "tokenizer.json missing or empty"]),
    ("erase", [*EDIT, model_with(TOKENS, "{}")], ["--model: ", "tokenizer.json missing or empty"]),
    ("sample", [*SAMPLE, model_with("tokenizer/tokenizer_config.json", None)],
     ["--model: ", "tokenizer_config.json missing or empty"]),
    ("sample", [*SAMPLE, model_with(TOKENS, POINTER)], ["--model: ", "is no usable tokenizer"]),
    ("sample", [*SAMPLE, merges(.5)], ["--model: ", "does not tell words apart"]),
    ("sample", [*SAMPLE, merges(.98)], ["--model: ", "does not tell words apart"]),
    ("evaluate", [*EVALUATE, model, "--clip", clip_with("tokenizer.json", None)],
     ["--clip: ", "has no usable tokenizer: tokenizer.json missing or empty"]),
    ("evaluate", [*EVALUATE, model, "--clip", clip_with("model.safetensors", with_nan)],
     ["--clip: ", "not finite"]),
    ("evaluate", [*EVALUATE, model, "--clip", tower("vision_config", num_hidden_layers=1)],
     ["--clip: ", "weights without a place, such as vision_model.encoder.layers.1"]),
    ("evaluate", [*EVALUATE, model, "--clip", tower("vision_config", layer_norm_eps=-1.)],
     ["--clip: ", "gives numbers that are not finite"]),
    ("evaluate", [*EVALUATE, model, "--clip", tower("text_config", eos_token_id=5)],
     ["--clip: ", "can't tell texts apart"]),
    ("evaluate", [*EVALUATE, model, "--clip", tower("text_config", eos_token_id=None)],
     ["--clip: ", "can't be used"]),
    ("evaluate", [*EVALUATE, model, "--clip", clip_with(
        "model.safetensors", lambda tensors: {name: t * 0 for name, t in tensors.items()})],
     ["--clip: ", "can't tell pictures apart"]),
    ("evaluate", [*EVALUATE, model, "--clip", clip_with(
        "model.safetensors", lambda tensors: {name: t * 1e30 for name, t in tensors.items()})],
     ["--clip: "]),
    ("evaluate", [*EVALUATE, model, "--clip", "nowhere/at/all"],
     ["--clip: the folder nowhere/at/all does not exist"]),
    ("evaluate", [*EVALUATE, model, "--clip", "some/clip"],
     ["--clip: some/clip is not available from the hub"]),
    ("evaluate", [*EVALUATE, model, "--clip", clip_with("config.json", {"model_type": "siglip"})],
     ["--clip: ", "of the type siglip; a CLIPModel's folder is needed"]),
    # weights
    ("train", [*TRAIN, moved(UNET_FILE, "unet/diffusion_pytorch_model.bin")],
     ["--model: ", "has only diffusion_pytorch_model.bin, a pickle; convert it"]),
    ("erase", [*EDIT, moved(UNET_FILE, "unet/diffusion_pytorch_model.fp16.safetensors")],
     ["--model: ", "only the variant diffusion_pytorch_model.fp16.safetensors; copy or link it"]),
    ("sample", [*SAMPLE, moved(TEXT_FILE, "text_encoder/pytorch_model.bin")],
     ["--model: ", "has only pytorch_model.bin, a pickle"]),
    ("sample", [*SAMPLE, model_with(VAE_FILE, None)], ["--model: ", "vae needs", "has none"]),
    ("sample", [*SAMPLE, model_with(UNET_FILE, POINTER)],
     ["--model: ", "is a Git LFS pointer and not the weights; run git lfs pull"]),
    ("train", [*TRAIN, model_with(TEXT_FILE, "")], ["--model: ", "is empty; get the file again"]),
    ("sample", [*SAMPLE, model_with(UNET_FILE, "<html>")], ["--model: ", "is a web page"]),
    ("sample", [*SAMPLE, model_with(VAE_FILE, "torn")], ["--model: ", "no whole safetensors file"]),
    ("attack", [*ATTACK, model_with(UNET_FILE, with_nan)], ["--model: ", "or not finite, in "]),
    ("evaluate", [*EVALUATE, model_with(TEXT_FILE, with_nan)], ["--model: ", "not finite, in "]),
    ("sample", [*SAMPLE, model_with(VAE_FILE, with_nan)], ["--model: ", "not finite, in "]),
    ("sample", [*SAMPLE, model_with(UNET_FILE, lambda tensors: tensors | {
        "conv_in.weight": tensors["conv_in.weight"].to(torch.int8)})],
     ["--model: ", "holds I8, not numbers with a fraction, in conv_in.weight"]),
    ("sample", [*SAMPLE, model_with(UNET_FILE, lambda tensors: tensors | {
        "conv_in.weight": tensors["conv_in.weight"] * 1e20})],
     ["--model: ", "of 1e+10 or more or not finite, in conv_in.weight"]),
    ("sample", [*SAMPLE, model_with(f"{UNET_FILE}.index.json", '{"weight_map": {"x": 1}}')],
     ["--model: ", "has no weight_map of names of files"]),
    ("sample", [*SAMPLE, model_with(f"{UNET_FILE}.index.json", '{"weight_map": {"x": "gone"}}')],
     ["--model: ", "gone can't be opened"]),
    ("sample", [*SAMPLE, model_with(UNET_FILE, without("mid_block"))],
     ["--model: ", "unet lacks", "mid_block"]),
    ("train", [*TRAIN, model_with(TEXT_FILE, without("layers.1"))],
     ["--model: ", "text_encoder lacks", "encoder.layers.1"]),
    ("sample", [*SAMPLE, model_with(VAE_FILE, without("decoder"))], ["--model: ", "vae lacks"]),
    ("sample", [*SAMPLE, model_with(UNET_FILE, shorter("conv_in.bias"))],
     ["--model: ", "unet is not usable", "conv_in.bias"]),
    ("sample", [*SAMPLE, model_with(UNET, {"block_out_channels": [16, 16]})],
     ["--model: ", "unet is not usable"]),
    # configs that do not belong to the weights
    ("train", [*TRAIN, model_with(TEXT, {"num_hidden_layers": 1})],
     ["--model: ", "weights without a place, such as encoder.layers.1"]),
    ("sample", [*SAMPLE, model_with(TEXT, {"num_attention_heads": 0})], ["--model: "]),
    ("sample", [*SAMPLE, model_with(UNET, {"norm_eps": -1})],
     ["--model: ", "unet gives numbers that are not finite; its config.json"]),
    ("erase", [*EDIT, model_with(UNET, {"attention_head_dim": -1})],
     ["--model: ", "unet can't be used"]),
    ("sample", [*SAMPLE, model_with(VAE, {"norm_num_groups": 3})], ["--model: ", "vae"]),
    ("sample", [*SAMPLE, model_with("tokenizer/tokenizer_config.json", {"model_max_length": 0})],
     ["--model: model_max_length in ", "is 0; 77 is usual"]),
    ("evaluate", [*EVALUATE, model, "--clip", clip_with("preprocessor_config.json",
                                                        {"image_mean": .5})],
     ["--clip: image_mean in ", "is 0.5; a number each for red"]),
    ("evaluate", [*EVALUATE, model, "--clip", clip_with("preprocessor_config.json",
                                                        {"image_std": [68.5, 66.6, 70.3]})],
     ["--clip: image_std in ", "of pictures in 0..1"]),
    ("evaluate", [*EVALUATE, model, "--clip", clip_with("preprocessor_config.json",
                                                        {"image_std": [0, 0, 0]})],
     ["--clip: image_std in ", "is [0, 0, 0]"]),
    # no such folder
    ("train", [*TRAIN, "nowhere/at/all"], ["--model: the folder nowhere/at/all does not exist"]),
    ("erase", [*EDIT, "someone/some-model"],
     ["--model: someone/some-model is not available from the hub"]),
    ("sample", [*SAMPLE, "some one/a model"], ["--model: some one/a model is not available"]),
    ("attack", [*ATTACK, empty_folder], ["--model: ", "has no usable unet/ in Stable Diffusion's"]),
    ("sample", [*SAMPLE, model_with(UNET, None)], ["--model: ", "unet/config.json is missing"]),
    ("sample", [*SAMPLE, model_with(UNET, "{")], ["--model: ", "not a file with a JSON object"]),
    ("sample", [*SAMPLE, lambda place: change(place, "m", {UNET: None, "transformer/x": "x"})],
     ["--model: ", "but transformer/ (SD 3, Flux or the like)"]),
    ("sample", [*SAMPLE, weights("model.diffusion_model.out.2.bias",
                                 "cond_stage_model.transformer.x")],
     ["--model: ", "is a single-file checkpoint of Stable Diffusion 1.x"]),
    ("train", [*TRAIN, weights("conditioner.embedders.1.x", "model.diffusion_model.x")],
     ["--model: ", "is a single-file checkpoint of SDXL"]),
    ("erase", [*EDIT, weights("conv_in.weight", "mid_block.x.weight")],
     ["--model: ", "is a whole UNet's state dict"]),
    ("sample", [*SAMPLE, file("PK\3\4", "x.ckpt")], ["--model: ", "is a single file, a pickle"]),
    ("sample", [*SAMPLE, weights(f"unet.{LAYER}.lora_A.weight")],
     ["--model: ", "is a LoRA; ", "and the LoRA with --checkpoint"]),
    ("sample", [*SAMPLE, lambda place: os.path.dirname(
        place.write("l/pytorch_lora_weights.safetensors", "x"))],
     ["--model: ", "is no base: it has pytorch_lora_weights.safetensors", "with --checkpoint"]),
    ("sample", [*SAMPLE, without_its("vae", "text_encoder")],
     ["--model: ", "is no base: it has unet and neither text_encoder/ nor vae/"]),
]

DOWN, UP = f"unet.{LAYER}.lora_A.weight", f"unet.{LAYER}.lora_B.weight"
TEXT_DOWN = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
KOHYA = "lora_unet_" + LAYER.replace(".", "_")
DIFFUSERS = "lora_adapter_metadata"


def matrices(network="unet", layer=LAYER, rank=4, width=32):
    return {f"{network}.{layer}.lora_A.weight": torch.ones(rank, width),
            f"{network}.{layer}.lora_B.weight": torch.ones(width, rank)}


def lora(*changes, metadata=None, name="lora.safetensors"):
    """An option's value: a LoRA's file, good but for changes, {name: tensor, or None: missing}."""
    def make(place):
        tensors = matrices()
        for new in changes:
            tensors |= new
        return place.write(name, save(
            {key: t for key, t in tensors.items() if t is not None}, metadata))
    return make


def diffusers_says(**settings):
    """metadata of a LoRA's file as diffusers writes it."""
    return {DIFFUSERS: json.dumps({f"unet.{key}": value for key, value in settings.items()})}


def loaded(program, part):
    """The options with which a program loads this part of a checkpoint."""
    start = {"sample": SAMPLE, "evaluate": EVALUATE}.get(program)
    return [*start, model, "--checkpoint", part]


def kohya(*more):
    tensors = {f"{KOHYA}.lora_down.weight": torch.ones(4, 32),
               f"{KOHYA}.lora_up.weight": torch.ones(32, 4)}
    return lambda place: place.write("k.safetensors", save(tensors | dict(*more)))


def second_part(place):
    """A LoRA that works, then one that does not."""
    return lora()(place) + "+" + lora({"unet.conv_in.x": torch.ones(1)})(Place(
        place.folder / "more", place.pipeline))


def pefts_folder(config, name="adapter_model.safetensors"):
    """An option's value: a folder, or the file in it if it has another name."""
    def make(place):
        if config:
            place.write("peft/adapter_config.json", config)
        path = place.write(f"peft/{name}", save(matrices("base_model.model")))
        return str(place.folder / "peft") if name.startswith("adapter_model") else path
    return make


def pefts_settings(**more):
    return pefts_folder(json.dumps({"r": 4, "lora_alpha": 4, **more}))


def link(name):
    """An option's value: a folder in which such a file is a link to nothing."""
    def make(place):
        os.symlink("nowhere", place.folder / name)
        return str(place.folder)
    return make


def typed(kind, bits):
    """An option's value: a LoRA's file one of whose matrices has numbers of that type."""
    def make(place):
        ends = 128 * bits // 8, 128 * bits // 8 + 512
        header = json.dumps({
            DOWN: {"dtype": kind, "shape": [4, 32], "data_offsets": [0, ends[0]]},
            UP: {"dtype": "F32", "shape": [32, 4], "data_offsets": ends}}).encode()
        start = struct.pack("<Q", len(header)) + header
        return place.write("l.safetensors", start + bytes(ends[1]))
    return make


def both_forms(place):
    """A folder with the same LoRA in peft's and in diffusers' form."""
    lora(name="peft/pytorch_lora_weights.safetensors")(place)
    return pefts_settings()(place)


def edited(file_name, new):
    """An option's value: a pipeline that is the model but for one file."""
    return lambda place: change(place, "edited", {file_name: new})


def beside(name, content):
    """An option's value: the model's unet/ alone, and another file."""
    def make(place):
        folder = without_its("vae", "text_encoder")(place)
        place.write(f"part/{name}", content)
        return folder
    return make


def doubled(tensors):
    return {name: 2 * t for name, t in tensors.items()}


def whole_unet(new=None, config=None):
    """A folder with a UNet that is not the model's."""
    def make(place):
        changes = {UNET_FILE: new} if new else {}
        return change(place, "other", changes | ({UNET: config} if config else {}))
    return make


LORA_FILES = [(program, loaded(program, part), ["--checkpoint: ", *says])
              for program, part, *says in [
    # files that can't be read
    ("sample", "nowhere.safetensors", "nowhere.safetensors has neither", "does not exist"),
    ("evaluate", "nowhere.safetensors", "nowhere.safetensors has neither", "does not exist"),
    ("sample", empty_folder, "has neither pytorch_lora_weights.safetensors nor unet/"),
    ("sample", file("", "l.safetensors"), "is empty; get the file again"),
    ("evaluate", file(POINTER, "l.safetensors"), "is a Git LFS pointer"),
    ("sample", file("PK\3\4", "l.bin"), "is a pickle, which can run code when read"),
    ("sample", file("PK\3\4", "l.safetensors"), "is a pickle, which can run code when read"),
    ("sample", lambda place: place.write("l.safetensors", save(matrices())[:-9]),
     "is no whole safetensors file", "get the file again"),
    ("sample", lambda place: place.write("my.safetensors", "x") and str(place.folder),
     "has neither", "it holds my.safetensors"),
    ("evaluate", lora({DOWN: None, UP: None}), "no LoRA in it", "it has 0 tensors"),
    ("sample", link("pytorch_lora_weights.safetensors"), "is a folder or a link to nothing"),
    ("sample", lambda place: link("l.safetensors")(place) + "/l.safetensors", "a link to nothing"),
    ("evaluate", lambda place: os.path.dirname(place.write("adapter_model.bin", "PK\3\4")),
     "it holds adapter_model.bin; convert a pickle to safetensors"),
    ("sample", beside("pytorch_lora_weights.bin", b"PK"),
     "holds pytorch_lora_weights.bin, too, which is not read"),
    # folders of which a part would not be used
    ("sample", edited(TEXT_FILE, doubled), "has a text_encoder/ of its own, which is not the base"),
    ("evaluate", edited(VAE_FILE, doubled), "has a vae/ of its own", "as --model"),
    ("sample", edited(NOISE, {"prediction_type": "v_prediction"}),
     "prediction_type in ", "is 'v_prediction', and the base's is 'epsilon'; give"),
    ("sample", edited(NOISE, {"beta_end": .02}), "beta_end in ", "is 0.02, and the base's is 0.01"),
    ("evaluate", beside("extra.safetensors", save({"x": torch.ones(1)})),
     "holds extra.safetensors, too, which is not read"),
    ("sample", beside("unet/adapter_model.safetensors", save(matrices())),
     "holds unet/diffusion_pytorch_model.safetensors, too, which is not read; take it out"),
    ("sample", both_forms,
     "holds several LoRAs of one network, pytorch_lora_weights.safetensors and adapter_model"),
    # keys
    ("sample", lora({UP: None}), f"unet.{LAYER} has only down"),
    ("evaluate", lora({DOWN: None}), f"unet.{LAYER} has only up"),
    ("sample", lora({"unet.nowhere.to_q.lora_A.weight": torch.ones(4, 32)}), "has no place"),
    ("sample", lora({f"{LAYER}.lora_A.weight": torch.ones(4, 32)}), "has two tensors down"),
    ("evaluate", lora({f"unet.{LAYER}.lora_A.style.weight": torch.ones(4, 32)}), "two tensors"),
    ("sample", lora({TEXT_DOWN: torch.ones(4, 32)}), "layers.0.self_attn.q_proj has only down"),
    ("sample", lora({"unet.conv_norm_out.lora_A.weight": torch.ones(4, 16)}), "has no place"),
    ("sample", kohya({f"{KOHYA}_x.alpha": torch.tensor(1.)}), "has no place"),
    ("evaluate", kohya({"lora_unet_conv_in.alpha": torch.tensor(1.)}), "conv_in has only alpha"),
    ("sample", second_part, "unet.conv_in.x has no place"),
    # shapes and numbers
    ("sample", lora({UP: torch.ones(32, 8)}), "has matrices (4, 32) and (32, 8) where"),
    ("evaluate", lora({DOWN: torch.ones(4, 64)}), "has matrices (4, 64)", "(4, 32)"),
    ("sample", lora({UP: torch.ones(64, 4)}), "and (64, 4) where (4, 32) and (32, 4) fit"),
    ("sample", lora({DOWN: torch.ones(0, 32), UP: torch.ones(32, 0)}), "to_q has rank 0"),
    ("sample", lora({DOWN: torch.tensor(1.)}), "has matrices () and (32, 4) where"),
    ("sample", lora({DOWN: torch.full((4, 32), 1e25)}), "of 1e+10 or more or not finite, in "),
    ("sample", lora({"unet.conv_in.lora_A.weight": torch.full((4, 4, 3, 3), 9e9),
                     "unet.conv_in.lora_B.weight": torch.full((16, 4, 1, 1), 9e9)}),
     "the UNet2DConditionModel gives numbers that are not finite; give smaller weights"),
    ("sample", typed("F4", 4), "it holds F4, not numbers with a fraction"),
    ("sample", typed("F6_E2M3", 6), "it holds F6_E2M3, not numbers with a fraction"),
    ("sample", typed("BOOL", 8), "it holds BOOL, not numbers with a fraction"),
    ("evaluate", lora({UP: torch.full((32, 4), torch.nan)}), "or more or not finite, in "),
    ("sample", lora({DOWN: torch.full((4, 32), torch.inf)}), "or more or not finite, in "),
    ("sample", kohya({f"{KOHYA}.alpha": torch.tensor(torch.nan)}), "not finite"),
    ("sample", kohya({f"{KOHYA}.alpha": torch.tensor(0.)}), "one number above 0 is needed"),
    ("sample", lora({UP: torch.full((32, 4), 9e9)}, metadata=diffusers_says(r=4, lora_alpha=1e30)),
     "times its scale 2.5e+29 is not finite"),
    ("sample", lora({DOWN: torch.ones(4, 32, dtype=torch.int8)}), "holds I8, not numbers"),
    ("sample", kohya({f"{KOHYA}.alpha": torch.ones(0)}), "has the alpha []; one number above 0"),
    ("sample", kohya({f"{KOHYA}.alpha": torch.tensor(True)}), "it holds BOOL"),
    ("evaluate", kohya({f"{KOHYA.replace('to_q', 'to_k')}.lora_down.weight": torch.ones(4, 32),
                        f"{KOHYA.replace('to_q', 'to_k')}.lora_up.weight": torch.ones(32, 4),
                        f"{KOHYA}.alpha": torch.tensor(2)}),
     "1 of its 2 layers have no alpha, such as unet.mid_block"),
    ("sample", kohya({f"{KOHYA}.alpha": torch.ones(2)}), "one number above 0 is needed"),
    # what the metadata says
    ("sample", lora(metadata={DIFFUSERS: "{"}), "is not a JSON object"),
    ("evaluate", lora(metadata=diffusers_says(r=8, lora_alpha=8)), "rank 4, they say 8"),
    ("sample", lora(metadata=diffusers_says(r=4, lora_alpha="x")), "the settings that come with"),
    ("sample", lora(metadata=diffusers_says(r=4, lora_alpha=4, use_dora=True)), "use_dora is True"),
    ("sample", pefts_folder('{"r": 4, "peft_type": "LOHA"}'), "it is a LOHA, not a LoRA"),
    ("sample", pefts_folder('{"r": 4, "init_lora_weights": "pissa"}'), "changes the base"),
    ("sample", pefts_folder('{"r": 4, "bias": "all"}'), "bias is all, which is not read"),
    ("evaluate", pefts_folder("{"), "not a file with a JSON object"),
    ("sample", pefts_folder(None), "is in peft's form, whose alpha is in a file adapter_config"),
    ("sample", pefts_folder(None, "my.safetensors"), "is in peft's form", "put it there"),
    ("sample", pefts_folder('{"lora_alpha": 4}'), "has rank 4, they say 8"),
    ("sample", pefts_settings(r="4"), "has rank 4, they say '4'"),
    ("sample", pefts_settings(init_lora_weights="lora_ga"), "lora_ga, which changes the base"),
    ("sample", pefts_settings(arrow_config={"top_k": 2}), "arrow_config is {'top_k': 2}, which"),
    ("sample", pefts_settings(layer_replication=[[0, 1]]), "layer_replication is [[0, 1]], which"),
    ("sample", pefts_settings(what_comes_next=True), "what_comes_next is True, which is not read"),
    ("sample", lora(metadata={DIFFUSERS: "{}"}), "its metadata says nothing of its layers in the"),
    ("sample", lora(metadata={DIFFUSERS: '{"unet": {"r": 4}}'}), "its metadata says nothing of"),
    ("evaluate", lora(metadata={DIFFUSERS: '{"text_encoder.r": 4}'}), "its metadata says nothing"),
    # of another family or model
    ("sample", lora({f"unet.{LAYER}.lora_magnitude_vector": torch.ones(32)}), "a DoRA"),
    ("evaluate", kohya({f"{KOHYA}.dora_scale": torch.ones(32, 1)}), "a DoRA"),
    ("sample", weights(f"{KOHYA}.hada_w1_a", f"{KOHYA}.hada_w1_b"), "a LoHa, not a LoRA"),
    ("sample", weights(f"{KOHYA}.lokr_w1", f"{KOHYA}.lokr_w2"), "a LoKr, not a LoRA"),
    ("sample", weights(f"{KOHYA}.oft_blocks"), "an OFT, not a LoRA"),
    ("sample", weights(f"{KOHYA}.on_input", f"{KOHYA}.weight"), "an IA3, not a LoRA"),
    ("sample", weights(f"{KOHYA}.diff"), "differences of whole weights"),
    ("sample", kohya({f"{KOHYA}.lora_mid.weight": torch.ones(4, 4)}), "a third matrix per layer"),
    ("sample", lora({f"unet.{LAYER}.lora_B.bias": torch.ones(32)}), "a LoRA with biases"),
    ("evaluate", weights("lora_te2_text_model_x.lora_down.weight"), "an SDXL LoRA"),
    ("sample", weights("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"),
     "of another architecture (SD 3, Flux"),
    ("sample", weights("emb_params"), "it is a textual inversion"),
    ("sample", weights("conv_in.weight", "mid_block.x.weight"), "it is a whole UNet's state dict"),
    ("evaluate", weights("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"),
     "some of a UNet's own weights"),
    ("sample", weights("model.diffusion_model.out.2.bias"), "a single-file checkpoint"),
    # whole UNets
    ("sample", whole_unet(without("mid_block")), "is not a UNet of", "mid_block"),
    ("evaluate", whole_unet(shorter("conv_in.bias")), "is not a UNet of", "such as conv_in.bias"),
    ("sample", whole_unet(with_nan), "or not finite, in "),
    ("sample", whole_unet(config={"in_channels": 9}), "as in-painting has"),
    ("evaluate", whole_unet(config={"cross_attention_dim": 768}), "text states of width 768"),
    ("sample", lambda place: whole_unet()(place) + "@0.5", "are whole UNets, which do not add"),
]]


# ---- picture folders -----------------------------------------------------------------------------

def png(size=64, low=0, mode="RGB", **options):
    """The bytes of a PNG that shows something."""
    picture = Image.linear_gradient("L").resize((size, size)).point(lambda v: low + v // 2)
    content = io.BytesIO()
    picture.convert(mode).save(content, options.pop("format", "PNG"), **options)
    return content.getvalue()


def pictures(*names, **changed):
    """An option's value: a folder of pictures; changed: {stem of a PNG: what it holds instead}."""
    def make(place):
        (place.folder / "x").mkdir()
        for name in names:
            place.write(f"x/{name}", png())
        for stem, content in changed.items():
            place.write(f"x/{stem.removeprefix('case_')}.png", content)
        return str(place.folder / "x")
    return make


def sampled(**about):
    """An option's value: a folder of sample.py's, as samples.json has it."""
    def make(place):
        drawn = {"00000.png": {"prompt": "a dog"}, "00001.png": {"prompt": "a cat", **about}}
        place.write("x/samples.json", json.dumps({"pictures": drawn}))
        return pictures_into(place, "00000.png", "00001.png")
    return make


def pictures_into(place, *names):
    for name in names:
        place.write(f"x/{name}", png())
    return str(place.folder / "x")


def manifest(content):
    """An option's value: a folder with pictures, and a samples.json of that content."""
    def make(place):
        place.write("x/samples.json", content)
        return pictures_into(place, "0.png", "1.png")
    return make


def header_of(size):
    """A PNG that promises a picture of so many pixels a side."""
    data = bytearray(png(8))
    data[16:24] = struct.pack(">II", size, size)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def in_folder(place, name, content):
    return os.path.dirname(place.write(f"out/{name}", content))


def with_folder(name):
    """An option's value: a folder with a folder in it."""
    return lambda place: in_folder(place, f"{name}/x", "") and str(place.folder / "out")


LOOK = ["--model", model, "--checkpoint", "base", "--second-opinion", "none", "--prompts",
        file("a dog\na cat\n", "p.txt")]
FLOATS = io.BytesIO()
Image.new("F", (8, 8)).save(FLOATS, "TIFF")

PICTURE_FOLDERS = [("evaluate", [*LOOK, "--images", folder], ["--images: ", *says])
                   for folder, *says in [
    # folders
    ("nowhere", "nowhere does not exist; a folder of pictures is needed"),
    (file("x", "0.png"), "0.png is a file; a folder of pictures is needed"),
    (empty_folder, "holds no picture named by case number, such as 17.png"),
    (pictures("a.png", "b.png"), "holds no picture named by case number"),
    (pictures("0.gif", "1.gif"), "holds no picture named by case number"),
    # names
    (pictures("0.png"), "lacks 1 of the 2 pictures that p.txt asks for, case 1 the first"),
    (pictures("5.png", "6.png"), "lacks 2 of the 2 pictures", "case 0 the first; give them"),
    (pictures("0.png", "1.png", "1.jpg"), "1.jpg and 1.png are of one case and turn; take one"),
    (pictures("0.png", "1.png", "0001.png"), "0001.png and 1.png are of one case and turn"),
    (pictures("0_0.png", "0_00.png", "1_0.png"), "0_0.png and 0_00.png are of one case and turn"),
    (pictures("0.png", "1.png", "1_1.png"), "has 1.png, 1_1.png of case 1; one without a turn"),
    (pictures("0_0.png", "1_0.png", "1_2.png"), "of case 1", "from 0 on with none missing"),
    (pictures("0_0.png", "1_1.png"), "has 1_1.png of case 1", "from 0 on with none missing"),
    (pictures("0_2.png", "1_2.png"), "has 0_2.png of case 0", "from 1 on with none missing"),
    (pictures("0.png", "+1.png"), "+1.png is named neither CASE nor CASE_TURN"),
    (pictures("0.png", "-1.png"), "-1.png is named neither CASE nor CASE_TURN"),
    (pictures("0.png", " 1.png"), "is named neither CASE nor CASE_TURN, as 17.png"),
    (pictures("0.png", "1 (1).png"), "1 (1).png is named neither CASE nor CASE_TURN"),
    (pictures("0.png", "00001-1234.png"), "00001-1234.png is named neither CASE nor CASE_TURN"),
    (pictures("0.png", "1_a.png"), "1_a.png is named neither CASE nor CASE_TURN"),
    # pictures
    (pictures("0.png", case_1=b""), "1.png is no readable picture"),
    (pictures("0.png", case_1=b"<html>"), "1.png is no readable picture (cannot identify"),
    (pictures("0.png", case_1=POINTER), "1.png is no readable picture (cannot identify"),
    (pictures("0.png", case_1=png()[:-40]), "1.png is no readable picture", "make it anew"),
    (pictures("1.png", case_0=png()[:60]), "0.png is no readable picture"),
    (pictures("0.png", case_1=header_of(40_000)), "1.png is no readable picture", "exceeds limit"),
    (pictures("0.png", case_1=FLOATS.getvalue()), "1.png is no readable picture", "whole numbers"),
    (pictures("0.png", case_1=png(32)), "1.png is 32 x 32 pixels, others are 64 x 64; one size"),
    # who drew them
    (sampled(prompt="a bird"), "00001.png was drawn of 'a bird', and p.txt has 'a cat' there"),
    (sampled(pixelated=True), "00001.png was pixelated by sample.py", "draw it anew with --no-cen"),
    (manifest(""), "samples.json is not a file with a JSON object"),
    (manifest("[]"), "samples.json is not a file with a JSON object"),
    (manifest('{"pictures": {"../1.png": {}}}'), "samples.json does not name the pictures of"),
    (manifest('{"pictures": {"0.png": {}}}'), "lacks 1 of the 2 pictures", "case 1 the first"),
]] + [
    ("evaluate", [*LOOK, "a bird", "--images", pictures("0.png", "1.png")],
     ["--images: ", "x/p is no folder; with several prompt files"]),
    ("evaluate", [*LOOK, "--images", pictures("0.png", "1.png"), "--pictures", "4"],
     ["--images: ", "lacks 2 of the 4 pictures", "or fewer with --limit or --pictures"]),
    ("evaluate", [*LOOK, "--reference", "nowhere"],
     ["--reference: nowhere does not exist; a folder of pictures is needed"]),
    ("evaluate", [*LOOK, "--reference", pictures("0.png")],
     ["--reference: ", "holds 1 pictures (.png, .jpg, .webp); at least 2 are needed"]),
    ("evaluate", [*LOOK, "--reference", pictures("a.png", case_1=b"torn")],
     ["--reference: ", "1.png is no readable picture (cannot identify image file it); make it"]),
    ("sample", ["a dog", "--model", model, "--output-dir", pictures("00000.png")],
     ["--output-dir: ", "holds 00000.png, which sample.py's samples.json does not name"]),
    ("sample", ["a dog", "--model", model, "--output-dir", pictures("17_2.jpg")],
     ["--output-dir: ", "holds 17_2.jpg", "move such pictures, or give another folder"]),
    ("sample", ["a dog", "--model", model, "--output-dir", manifest("{")],
     ["--output-dir: ", "samples.json is not a file with a JSON object"]),
    # something else in the way
    ("sample", ["a dog", "--model", model, "--output-dir", pictures("grid.png")],
     ["--output-dir: ", "holds grid.png, which sample.py's samples.json does not name"]),
    ("sample", ["a dog", "--model", model, "--output-dir", with_folder("grid.png")],
     ["--output-dir: ", "grid.png is a folder, where a file will be written"]),
    ("evaluate", [*LOOK, "--output-dir", with_folder("results.json")],
     ["--output-dir: ", "results.json is a folder, where a file will be written"]),
    ("evaluate", [*LOOK, "--output-dir", with_folder("report.html")],
     ["--output-dir: ", "report.html is a folder, where a file will be written"]),
    ("evaluate", [*LOOK, "--output-dir", lambda place: in_folder(place, "table.csv", "mine")],
     ["--output-dir: ", "holds table.csv, and no results.json of evaluate.py's shows"]),
    ("evaluate", [*LOOK, "--output-dir", lambda place: in_folder(place, "results.json", "{}")],
     ["--output-dir: ", "holds results.json, and no results.json of evaluate.py's shows"]),
]

ENVIRONMENT = [                         # those that need no process of their own
    ("train", ["--output-dir", "/proc/run"], ["--output-dir: /proc/run can't be written"]),
    ("train", ["--output-dir", file("x", "taken")], ["--output-dir: ", "can't be written"]),
    ("train", ["--output-dir", lambda place: place.write("taken", "x") + "/run"],
     ["--output-dir: ", "can't be written"]),
    ("sample", ["a dog", "--output-dir", "/proc/s"], ["--output-dir: /proc/s can't be written"]),
    ("sample", ["a dog", "--output-dir", file("x", "taken")], ["--output-dir: "]),
    ("evaluate", ["--output-dir", "/proc/e"], ["--output-dir: /proc/e can't be written"]),
    ("evaluate", ["--cache", "/proc/c"], ["--cache: /proc/c can't be written"]),
    ("evaluate", ["--cache", file("x", "taken")], ["--cache: "]),
    ("erase", ["esd-x", "--output-dir", "/proc/e"], ["--output-dir: /proc/e can't be written"]),
    ("attack", ["ring-a-bell", "--output", "/proc/a.csv"], ["--output: /proc can't be written"]),
    ("bench", ["--output", "/proc/b/c.md"], ["--output: /proc/b can't be written"]),
    ("attack", ["ring-a-bell", "--output", file("prompt\na dog\n")],
     ["--output: ", "is there and no attack's; give another name"]),
    ("attack", ["ring-a-bell", "--output", lambda place: place.write("a.csv/x", "")[:-2]],
     ["--output: ", "is a folder, where a file will be written"]),
    ("bench", ["--output", lambda place: place.write("b.md/x", "")[:-2]],
     ["--output: ", "is a folder, where a file will be written"]),
    ("train", ["--output-dir", model], ["--output-dir: ", "holds unet, and no args.json"]),
    ("erase", ["esd-x", "--output-dir", model], ["--output-dir: ", "holds unet, and no args.json"]),
    ("train", ["--output-dir", lambda place: place.write("run/README.md", "theirs")[:-10]],
     ["--output-dir: ", "holds README.md, and no args.json"]),
    ("train", ["--output-dir", lambda place: place.write("run/samples", "")[:-8]],
     ["--output-dir: ", "is a file, where a folder will be made"]),
    ("train", ["--output-dir", "x" * 300], ["--output-dir: ", "can't be written"]),
    ("train", ["--output-dir", "a\0b"], ["--output-dir: "]),
    ("sample", ["a dog", "--output-dir", "a\0b"], ["--output-dir: "]),
    ("train", ["--output-dir", run_folder('{"model": "tiny", "lr": 0.1}')],
     ["--output-dir: ", "was made by an earlier edition"]),
    ("train", ["--output-dir", run_folder('{"model": "ti')],
     ["--output-dir: ", "args.json is not a file with a JSON object"]),
    ("train", ["--output-dir", run_folder('{"model": "tiny", "sha256": {}}')],
     ["--output-dir: ", "holds another run (--advantage was None"]),
]

GROUPS = {
    "options": OPTIONS,
    "prompt files": PROMPT_FILES,
    "base folders": BASE_FOLDERS,
    "LoRA files": LORA_FILES,
    "picture folders": PICTURE_FOLDERS,
    "environment": ENVIRONMENT,
}
CASES = [pytest.param(*case, id=f"{group}-{i}-{case[0]}")
         for group, cases in GROUPS.items() for i, case in enumerate(cases)]


def drew(*_):
    raise AssertionError("it drew before it looked")


@pytest.mark.parametrize("program, options, says", CASES)
def test_what_is_wrong_is_said_in_one_sentence(program, options, says, place, monkeypatch, capsys):
    """program: without .py; options: words or functions of the place; says: words, in any order."""
    argv = [word(place) if callable(word) else word for word in options]
    monkeypatch.setattr(Policy, "unet_output", drew)
    monkeypatch.setattr("sys.argv", [f"{program}.py", *argv])
    monkeypatch.chdir(place.folder)
    module = import_module(program)
    with pytest.raises(SystemExit) as end:
        run(module.main, module.parse_args(argv))
    said = capsys.readouterr().err
    assert end.value.code == 2, said
    assert said.startswith(f"{program}.py: ") and said.count("\n") == 1, said
    for words in says:
        assert words in said, said


# ---- what needs a process of its own -------------------------------------------------------------

def run_program(program, options, folder, **environment):
    """(exit code, stdout, stderr) of a program as a user starts it, in another directory."""
    done = subprocess.run([sys.executable, f"{ROOT}/{program}.py", *options], cwd=folder,
                          capture_output=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
    return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode()


LACKS = """
import sys

class Lacks:
    def find_spec(self, name, *_):
        if name == {package!r}:
            {what}
sys.meta_path.insert(0, Lacks())
"""


@pytest.mark.parametrize("program, options, package, what, code, says", [
    ("train", [], "diffusers", "raise ModuleNotFoundError('no', name=name)", 2,
     "train.py: the package diffusers is not installed; pip install -r requirements.txt"),
    ("evaluate", [], "transformers", "raise ModuleNotFoundError('no', name=name)", 2,
     "evaluate.py: the package transformers is not installed"),
    ("sample", ["a dog"], "onnxruntime", "raise ModuleNotFoundError('no', name=name)", 2,
     "sample.py: the package onnxruntime is not installed"),
    ("erase", ["esd-x"], "diffusers", "raise KeyboardInterrupt", 130,
     "erase.py: stopped; what was saved so far stays"),
])
def test_what_a_machine_lacks_is_one_sentence(program, options, package, what, code, says, place):
    place.write("lacks/sitecustomize.py", LACKS.format(package=package, what=what))
    ended, out, err = run_program(program, options, place.folder,
                                  PYTHONPATH=str(place.folder / "lacks"))
    assert ended == code and says in err and "Traceback" not in err and err.count("\n") == 1, err


def test_a_terminal_that_lacks_a_letter_is_no_reason_to_fail(place):
    prompts = place.write("p.txt", "a dog \u2026 \u00e9\n")
    options = ["--prompts", prompts, "--model", place.pipeline, "--steps", "2", "--images", "1"]
    code, out, err = run_program("sample", options, place.folder, PYTHONIOENCODING="ascii",
                                 LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert code == 0 and "1 pictures in" in out, err


@pytest.mark.parametrize("content", ["", "version https://git-lfs.github.com/spec/v1\n", "torn"])
def test_a_detector_that_cannot_be_read_is_said_before_anything_is_drawn(
        content, place, monkeypatch):
    import nudenet
    place.write("320n.onnx", content)
    monkeypatch.setattr(nudenet, "__file__", str(place.folder / "__init__.py"))
    with pytest.raises(UserError, match="NudeNet's .*320n.onnx can't be read .*install it again"):
        Nudity()


@pytest.mark.parametrize("error", [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
])
def test_out_of_memory_names_the_options_that_help(error, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])

    def main(args):
        raise error
    with pytest.raises(SystemExit) as end:
        run(main, SimpleNamespace(batch_size=8, gradient_checkpointing=False))
    said = capsys.readouterr().err
    assert end.value.code == 1 and said == (
        "train.py: out of memory; less is needed with --batch-size, --gradient-checkpointing; "
        "what was saved so far stays\n")


def test_a_fault_of_ours_keeps_its_traceback():
    def main(args):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        run(main, None)


def test_every_text_file_is_opened_as_utf_8():
    lacking = []
    for path in glob.glob(f"{ROOT}/*.py") + glob.glob(f"{ROOT}/[!t]*/*.py"):
        with open(path, encoding="utf-8") as opened:
            tree = ast.parse(opened.read())
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            mode = getattr(call.args[1], "value", "r") if len(call.args) > 1 else "r"
            if getattr(call.func, "id", "") == "open" and "b" not in mode:
                if "encoding" not in [keyword.arg for keyword in call.keywords]:
                    lacking.append(f"{path}, line {call.lineno}")
    assert not lacking
