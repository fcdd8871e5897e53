"""What a system needs before it is evaluated: its checkpoint, and what is made to attack it.

All are made by other programs of this repository, where they are absent.
"""
import json
import os
import re
import shlex
import subprocess
import sys
import time

import rivals
from attacks import ATTACKS
from judging.rows import has_weights
from judging.store import files_of_code, sha256
from plumbing.files import write
from plumbing.options import UserError, spelled
from plumbing.origin import hashes
from plumbing.worlds import ROOT, locate, read_json, read_recipe
from prompts import read

# ---- checkpoints ---------------------------------------------------------------------------------

def command(words):
    """Run a program, its output passed on; returns the seconds that it took.

    Those of the CPU where they are fewer: what else a machine did at the time does not count.
    "python" is this one's interpreter; a program of this repository is found from anywhere.
    """
    print("$ " + shlex.join(words), flush=True)
    began, before, words = time.time(), cpu_seconds(), list(words)
    if words[0] == "python":
        words[0] = sys.executable
        is_program = len(words) > 1 and words[1].endswith(".py")
        if is_program and not os.path.exists(words[1]):
            words[1] = os.path.join(ROOT, words[1])
    try:
        code = subprocess.run(words).returncode
    except OSError as error:
        raise UserError(f"--systems: {words[0]} can't be run ({error.strerror})") from None
    if code:
        raise UserError(f"--systems: {shlex.join(words)} ended with an error, shown above; what "
                        "is made stays, and the same command resumes")
    wall, of_cpu = time.time() - began, cpu_seconds() - before
    return min(wall, of_cpu) if of_cpu else wall        # Windows does not count them


def cpu_seconds():
    """Of the programs that were run and have ended."""
    times = os.times()
    return times.children_user + times.children_system


def to_make(systems, every_system):
    """{path: the command that makes it} of the systems' checkpoints that are absent or unfinished.

    UserError where no row of every_system says how a part is made.
    """
    commands = {}
    for system in systems:
        for path, _ in system.parts:
            if not has_weights(path):
                commands[path] = maker_of(path, every_system)
                if not commands[path]:
                    raise UserError(f"--systems: row {system.name!r} needs {path}, which has no "
                                    "weights, and no row makes it; fill its column make")
    return commands


def make_missing(system, every_system):
    """Make what a system's checkpoint lacks; the seconds are kept beside the weights."""
    for path, words in to_make([system], every_system).items():
        if has_weights(path):                           # an earlier command made it, too
            continue
        seconds = command(shlex.split(words))
        if not has_weights(path):
            raise UserError(f"--systems: {words} ended without weights in {path}")
        if os.path.isdir(path):
            write(os.path.join(path, "seconds.json"), json.dumps({"seconds": seconds}))


def maker_of(path, systems):
    """The command that makes a part: of the row that is this part alone, else of any with it."""
    makers = [system for system in systems if system.make and path in dict(system.parts)]
    makers.sort(key=lambda system: len(system.parts))
    return makers[0].make if makers else ""


def training_seconds(system):
    """What it took to make a system's checkpoint, or None where that is not known."""
    files = [os.path.join(path, "seconds.json") for path, _ in system.parts]
    if not files or not all(os.path.isfile(file) for file in files):
        return None
    return sum(read_json(file, "--systems").get("seconds", 0) for file in files)


# ---- attacks -------------------------------------------------------------------------------------

def attack(name, setup, source, output, checkpoint=None):
    """Make an attack's prompts of a prompt file by attack.py.

    Not if they are there as they were made, by the same command, code, files and weights (those of
    a hub id go by its name). checkpoint: the System that is attacked, for an attack that looks into
    it.
    """
    words = attack_command(name, setup, source, ("batch_size",), checkpoint)
    words += ["--count", str(setup.args.attacks), "--output", output]
    if setup.args.category:
        words += ["--category", setup.args.category]
    made_of = depends_on(name, setup, words, [source, states_of(source)], checkpoint)
    note = os.path.splitext(output)[0] + ".json"

    def with_what_was_made():
        return json.dumps({**made_of, "made": hashes([output, states_of(output)])}, indent=1)
    if os.path.exists(output) and os.path.exists(note):
        with open(note, "rb") as file:
            if file.read() == with_what_was_made().encode():
                return
    command(words)
    write(note, with_what_was_made())


def fine_tune(setup, checkpoint, folder):
    """Teach a System's checkpoint the world's task by attack.py; returns the LoRA's folder.

    It lies in `folder`, named after all that it depends on.
    """
    source = setup.world.task
    looked_at = [source, os.path.join(ROOT, "erase.py")]                        # which has the loop
    looked_at += [entry.benign for entry in setup.world.training_files[:1]]     # is preserved
    looked_at += [prompt.image for prompt in read(source, option="--model")[0]]
    words = attack_command("fine-tune", setup, source, (), checkpoint)
    made_of = depends_on("fine-tune", setup, words, looked_at, checkpoint)
    output = os.path.join(folder, f"{slug(checkpoint.checkpoint)}_{sha256(made_of)[:8]}")
    if not has_weights(output):
        command([*words, "--output", output])
    return output


def attack_command(name, setup, source, options, checkpoint=None):
    """attack.py's command, without what it writes; checkpoint: a System, or None.

    options: names of those that the attack has of the evaluation, beside how pictures are drawn.
    """
    args = setup.args
    words = ["python", "attack.py", name, "--model", setup.world.model, "--recipe", args.recipe,
             "--prompts", source, "--device", args.device, "--seed", str(args.seed)]
    uses = rivals.find(ATTACKS, name, "attack").uses
    for option in ("steps", "eta", "guidance", "resolution", *options, "unsafe_labels", "dtype"):
        value = getattr(args, option)
        if option in uses and value is not None:
            words += [spelled(option), str(value)]
    if checkpoint and checkpoint.parts:
        words += ["--checkpoint", checkpoint.checkpoint]
    return words


def depends_on(name, setup, words, sources, checkpoint=None):
    """All that an attack's result depends on: its command, code, files and weights."""
    world = setup.world
    weights = [path for path, _ in checkpoint.parts] if checkpoint else []
    looked_at = [*sources, locate(world.model), world.clip, world.concept_pairs,
                 os.path.join(ROOT, "attack.py"), *files_of_code(ATTACKS[name]), *weights]
    return {"command": words, "recipe": read_recipe(setup.args.recipe),
            "files": hashes(filter(None, looked_at))}


def states_of(path):
    """Where a prompt file's text states lie."""
    return os.path.splitext(path)[0] + ".safetensors"


def slug(text):
    """A text as a file's name: out/rivals/esd-x -> out_rivals_esd-x."""
    return re.sub(r"[^A-Za-z0-9.@-]+", "_", text).strip("_")
