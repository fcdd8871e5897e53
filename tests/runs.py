"""Runs of train.py as a user starts them, and processes that need no seconds to start."""
import json
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def without(options, name):
    """The options less one of them and its value."""
    at = options.index(name)
    return options[:at] + options[at + 2:]


def start(*options):
    return subprocess.Popen([sys.executable, f"{ROOT}/train.py", *options], text=True, cwd=ROOT,
                            env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def train(*options):
    """(exit code, stdout, stderr) of one run."""
    process = start(*options)
    texts = process.communicate(timeout=300)
    return process.returncode, *texts


def fork(function, *arguments):
    """A process that calls it, with all that is imported here; conftest's one thread allows it."""
    if torch.cuda.is_initialized():
        pytest.skip("a process that has used a GPU can't be forked")
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments,
                                                          daemon=True)
    process.start()
    return process


def metrics_of(folder):
    """The rows of metrics.jsonl, without the first one: what the base was like (epoch 0)."""
    with open(f"{folder}/metrics.jsonl") as file:
        return [json.loads(line) for line in file][1:]


def results(folder):
    """Everything that a run leaves and that must be equal, as bytes by file name."""
    names = ["metrics.jsonl", "pytorch_lora_weights.safetensors",
             "pytorch_lora_weights_kohya.safetensors"]
    names += [f"samples/{name}" for name in sorted(os.listdir(f"{folder}/samples"))]
    return {name: open(f"{folder}/{name}", "rb").read() for name in names}


def differing(folder, other):
    """The names of the results that are not equal."""
    ours, theirs = results(folder), results(other)
    return [name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)]
