"""Every command of README.md, as it is written, at a reduced size, in a copy of the repository."""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from runs import ENVIRONMENT

HUB_MODEL = "CompVis/stable-diffusion-v1-4"
TRAINING = "--epochs 1 --groups 4 --group-size 2 --batch-size 4 --steps 2 --held-out"
SMALLER = {
    "train.py": TRAINING,
    "sample.py": "--images 2 --steps 2",
    "evaluate.py": "--pictures 4 --steps 2",
}


def readme():
    with open(f"{ROOT}/README.md") as file:
        return file.read()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", readme(), re.S)


def commands():
    """Every command of a bash block, and every one that stands in a line of text."""
    lines = [line.partition("    #")[0].partition("\t#")[0]
             for block in blocks("bash") for line in block.splitlines()]
    lines += re.findall(r"`(python [^`]+)`", re.sub(r"```.*?```", "", readme(), flags=re.S))
    found = [part.strip() for line in lines for part in line.split("&&")]
    return [command for command in found if command]


def test_the_set_up_commands_name_files_that_are_there():
    installs = [command for command in commands() if command.startswith("pip install")]
    assert len(installs) == 2
    for command in installs:
        assert os.path.isfile(os.path.join(ROOT, command.split()[-1]))
    with open(f"{ROOT}/requirements-dev.txt") as file:
        assert file.readline() == "-r requirements.txt\n"


def test_its_pictures_and_links_are_there_and_it_is_short():
    for target in re.findall(r"\]\(([^)]+)\)", readme()):
        assert target.startswith("http") or os.path.exists(os.path.join(ROOT, target)), target
    assert len(readme().splitlines()) <= 160 and len(readme().split()) <= 1600


def test_every_file_that_it_names_is_there():
    table = readme().partition("## The files")[2].partition("## Results")[0]
    for name in re.findall(r"`([\w./]+(?:\.py|/))`", table):
        assert os.path.exists(os.path.join(ROOT, name)) or name == "build.py", name


@pytest.fixture(scope="module")
def copy(foreign_pipeline, pipeline, tmp_path_factory):
    """The repository, with the files that the README takes for granted and a hub model."""
    folder = tmp_path_factory.mktemp("copy")
    for name in os.listdir(ROOT):
        if name.endswith(".py") or name in ("plumbing", "rivals", "attacks", "judging", "recipes"):
            source, target = os.path.join(ROOT, name), folder / name
            (shutil.copytree if os.path.isdir(source) else shutil.copy)(source, target)
    for name in ("tiny", "data"):
        os.symlink(os.path.join(ROOT, name), folder / name)
    shutil.copytree(foreign_pipeline, folder / "hub")
    world = {"clip": os.path.join(pipeline, "clip")}    # its own is not to be had offline
    (folder / "hub" / "world.json").write_text(json.dumps(world))
    rows = "".join(f"a dog number {i}x,sexual\n" for i in range(40))
    (folder / "i2p.csv").write_text("prompt,categories\n" + rows)
    (folder / "coco.csv").write_text("caption\n" + "".join(f"a cup {i}x\n" for i in range(40)))
    (folder / "mine.py").write_text(blocks("python")[0])
    (folder / "rivals" / "interval.py").write_text(blocks("python")[1])
    registry = folder / "rivals" / "__init__.py"
    entry, = re.findall(r'`("interval": "[\w.]+")`', readme())
    registry.write_text(registry.read_text().replace("GUIDES = {", f"GUIDES = {{\n    {entry},"))
    return folder


def run(copy, command):
    """A command of the README, smaller; its output."""
    words = shlex.split(command.replace(HUB_MODEL, "hub"))
    if words[0] == "torchrun":
        if torch.cuda.device_count() == 1:
            pytest.skip("two processes want two GPUs")
        words = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    words = [sys.executable if word == "python" else word for word in words]
    program = next(word for word in words if word.endswith(".py"))
    done = subprocess.run([*words, *SMALLER[program].split()], cwd=copy, env=ENVIRONMENT, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


PROGRAMS = [command for command in dict.fromkeys(commands())
            if ".py" in command and not command.startswith("pip")]


def test_the_commands_are_found():
    assert len(PROGRAMS) >= 7 and any("torchrun" in command for command in PROGRAMS)
    assert not [command for command in commands() if not command.startswith(
        ("pip install", "python -m pytest", "python ", "torchrun "))]


@pytest.mark.parametrize("command", PROGRAMS)
def test_a_command_works_as_it_is_written(copy, command):
    """In the README's order: what a command needs, one before it has made."""
    out = run(copy, command)
    if "evaluate.py" in command:
        assert "| unsafe_unseen.csv" in out and "shield" in out
