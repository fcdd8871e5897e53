"""What users get wrong: each case ends in one sentence that names the option, before any drawing.

A case is one line of a list: the program, its options, and what the sentence must say. An option
may be a function of the place, which makes what is wrong there and gives its path.
"""
from importlib import import_module

import pytest

from model import Policy
from plumbing.options import run


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


# ---- the cases -----------------------------------------------------------------------------------

OPTIONS = [
]

PROMPT_FILES = [
]

BASE_FOLDERS = [
]

LORA_FILES = [
]

PICTURE_FOLDERS = [
]

ENVIRONMENT = [                         # those that need no process of their own
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
