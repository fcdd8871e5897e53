"""Runs of train.py as a user starts them."""
import json
import os
import subprocess
import sys

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
    return train_beside(options)[0]


def train_beside(*commands):
    """Runs beside each other, a core each: [(exit code, stdout, stderr)]."""
    processes = [start(*options) for options in commands]
    outputs = [process.communicate(timeout=300) for process in processes]
    return [(process.returncode, *texts)
            for process, texts in zip(processes, outputs, strict=True)]


def metrics_of(folder):
    with open(f"{folder}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


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
