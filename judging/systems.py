"""A systems file in one table: what each defence keeps, costs, and lets through under attack.

A systems file is a CSV with a line per row of the table and the columns

    name         the row's
    checkpoint   its weights, as --checkpoint takes them; base for the base model
    method       how its pictures are drawn; plain if left out
    concept      the method's words; the model's if left out
    make         the command that makes the checkpoint, run where its weights are absent

What is absent is made; Ring-A-Bell's prompts are made once, soft prompts against each checkpoint;
all rows are evaluated on the same prompts and seeds, and timed. What is there is not made again.
"""
import csv
import glob
import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass

import rivals
from attacks import ATTACKS
from judging.compare import label_sets
from judging.report import markdown_row, rounded, shown
from judging.rows import (
    System,
    before_attack,
    check_parts,
    first_seed,
    has_weights,
    load_system,
    open_file,
)
from judging.store import files_of_code
from plumbing.files import make_folder, write
from plumbing.names import parse_checkpoint
from plumbing.options import UserError, spelled
from plumbing.origin import files_of, sha256_of
from plumbing.remarks import check_words
from plumbing.tables import csv_rows, named, read_text
from plumbing.worlds import ROOT, locate, read_json, read_recipe
from prompts import cycle_prompts
from sample import choose_method, generate_with_blocking

NEEDED = ("name", "checkpoint")
COLUMNS = (*NEEDED, "method", "concept", "make")
SOFT_PROMPT = "soft prompt"             # stands for a file that each checkpoint has of its own
RING_A_BELL = "ring_a_bell.csv"


# ---- the file ------------------------------------------------------------------------------------

def read_systems(path, names=()):
    """A systems file -> its systems, and those that are asked for, the base first: two lists.

    names: the rows that are asked for; all if empty. UserError where the file can't be used.
    """
    systems = []
    for line, row in read_lines(path):
        where = f"--systems: {path}, line {line}"
        system = as_system(row, where)
        if system.name in [other.name for other in systems]:
            raise UserError(f"{where} is the second row named {system.name!r}; rename one")
        systems.append(system)
    known = {system.name: system for system in systems}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"--rows: {unknown[0]!r} is unknown; give some of {', '.join(known)}")
    asked = [known[name] for name in names] or systems
    base = next((system for system in systems if is_base(system)), System(name="base"))
    if base.name in known and known[base.name] != base:
        raise UserError(f"--systems: the row {base.name!r} of {path} is not the base model; "
                        "rename it")
    return systems, [base, *(system for system in dict.fromkeys(asked) if system != base)]


def is_base(system):
    return not system.parts and system.method == "plain"


def read_lines(path):
    """[(line number, {column: text})] of a systems file."""
    header, lines = csv_rows(read_text(path, "--systems"), f"--systems: {path}")
    for column in NEEDED:
        if column not in header:
            raise UserError(f"--systems: {path} has no column {column!r}; "
                            f"its columns are {named(header)}")
    for column in header:
        if column not in COLUMNS:
            raise UserError(f"--systems: {path} has an unknown column {column!r}; "
                            f"known are {', '.join(COLUMNS)}")
    if not lines:
        raise UserError(f"--systems: {path} has no row")
    return lines


def as_system(row, where):
    """A line of a systems file, {column: text}, as a System."""
    cell = {column: (row.get(column) or "").strip() for column in COLUMNS}
    for column in NEEDED:
        if not cell[column]:
            raise UserError(f"{where} has an empty {column}")
    try:
        checkpoint = parse_checkpoint(cell["checkpoint"], rivals.is_method)
        shlex.split(cell["make"])
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('--checkpoint: ')}") from None
    except ValueError as error:
        raise UserError(f"{where}: make is no command ({str(error).lower()})") from None
    if checkpoint.method and cell["method"]:
        raise UserError(f"{where} names two methods, {checkpoint.method} and {cell['method']}; "
                        "leave one out")
    method = cell["method"] or checkpoint.method or "plain"
    rivals.find_method(method, f"{where}: method")
    concept = cell["concept"] or checkpoint.concept
    check_words(method, concept, f"{where}: concept")
    return System(checkpoint.parts, method, concept, cell["name"], cell["make"])


# ---- making what is absent -----------------------------------------------------------------------

def command(words):
    """Run a program, its output passed on; returns the seconds that it took.

    "python" is this one's interpreter; a program of this repository is found from anywhere.
    """
    print("$ " + shlex.join(words), flush=True)
    began, words = time.time(), list(words)
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
    return time.time() - began


def make_missing(systems, every_system):
    """Make the checkpoints of `systems` that are absent or unfinished, by the rows' commands.

    The seconds are kept beside the weights. UserError, before anything runs, where no row of
    every_system says how a part is made.
    """
    to_make = {}
    for system in systems:
        for path, _ in system.parts:
            if not has_weights(path):
                to_make[path] = maker_of(path, every_system)
                if not to_make[path]:
                    raise UserError(f"--systems: row {system.name!r} needs {path}, which has no "
                                    "weights, and no row makes it; fill its column make")
    for path, words in to_make.items():
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


# ---- attacking -----------------------------------------------------------------------------------

def attack(name, setup, source, output, checkpoint=None):
    """Make an attack's prompts of a prompt file by attack.py.

    Not if they are there as they were made, by the same command, code, files and weights (those of
    a hub id go by its name). checkpoint: the System that is attacked, for an attack that looks into
    it.
    """
    options, weights = [], []
    if checkpoint and checkpoint.parts:
        options = ["--checkpoint", checkpoint.checkpoint]
        weights = [path for path, _ in checkpoint.parts]
    args, world = setup.args, setup.world
    words = ["python", "attack.py", name, "--model", world.model, "--recipe", args.recipe,
             "--prompts", source, "--count", str(args.attacks), "--output", output,
             "--device", args.device, "--seed", str(args.seed)]
    if args.category:
        words += ["--category", args.category]
    uses = rivals.find(ATTACKS, name, "attack").uses
    for option in ("steps", "eta", "guidance", "resolution", "batch_size", "unsafe_labels",
                   "dtype"):
        value = getattr(args, option)
        if option in uses and value is not None:
            words += [spelled(option), str(value)]
    words += options
    looked_at = [source, states_of(source), locate(world.model), world.clip, world.concept_pairs,
                 os.path.join(ROOT, "attack.py"), *files_of_code(ATTACKS[name]), *weights]
    made_of = {"command": words, "recipe": read_recipe(args.recipe),
               "files": hashes(filter(None, looked_at))}
    note = os.path.splitext(output)[0] + ".json"

    def with_what_was_made():
        return json.dumps({**made_of, "made": hashes([output, states_of(output)])}, indent=1)
    if os.path.exists(output) and os.path.exists(note):
        with open(note, "rb") as file:
            if file.read() == with_what_was_made().encode():
                return
    command(words)
    write(note, with_what_was_made())


def states_of(path):
    """Where a prompt file's text states lie."""
    return os.path.splitext(path)[0] + ".safetensors"


def hashes(paths):
    """{path: SHA-256} of the files, and of the weights and configs in the folders, that are there.
    """
    files = []
    for path in paths:
        inside = glob.glob(os.path.join(glob.escape(path), "*.safetensors"))
        files += [path, *sorted(inside), *files_of(path).values()]
    return {path: sha256_of(path) for path in files if os.path.isfile(path)}


def soft_prompts_of(checkpoint, folder):
    """Where the soft prompts against a checkpoint lie: soft_out_rivals_esd-x.csv."""
    name = re.sub(r"[^A-Za-z0-9.@-]+", "_", checkpoint).strip("_")
    return os.path.join(folder, f"soft_{name}.csv")


def attacked(path, args):
    """An attack's prompts as {name: File}, with those before it, and {file: the file before}."""
    seed = first_seed(args.seed)
    file = open_file(path, "adversarial", args.attacks, option="--adversarial", seed=seed)
    plain = before_attack(file)
    if plain is None:
        return {file.name: file}, {}
    return {plain.name: plain, file.name: file}, {file.name: plain.name}


# ---- the table -----------------------------------------------------------------------------------

@dataclass
class Column:
    """A number of each row."""
    title: str
    file: str
    metric: str


def columns_of(files, labels):
    """The table's columns: files are {name: File}."""
    unsafe = [name for name, file in files.items() if file.kind == "unsafe"]
    benign = [name for name, file in files.items() if file.kind == "benign"]
    rate = f"unsafe.{next(iter(label_sets(labels)))}"
    columns = []
    for name in unsafe:                                 # unsafe_unseen.csv -> "unsafe, unseen"
        title = os.path.splitext(name)[0].replace("_", ", ", 1)
        columns.append(Column(title, name, rate))
    columns += [
        Column("Ring-A-Bell, ASR 1", RING_A_BELL, "asr1"),
        Column("soft prompt, ASR 3", SOFT_PROMPT, "asr3"),
        Column("named on unsafe", unsafe[0], "named"),
        Column("in-prompt CLIP", unsafe[0], "clip"),
        Column("blocked", unsafe[0], "blocked"),
        Column("no picture", unsafe[0], "no_picture"),
    ]
    if benign:
        columns += [
            Column("benign CLIP", benign[0], "clip"),
            Column("benign named", benign[0], "named"),
            Column("benign, hand kept", benign[0], "hand"),
            Column("benign, safe hand", benign[0], "safe_hand"),
            Column("benign CLIP distance", benign[0], "clip_distance"),
            Column("false alarms", benign[0], rate),
            Column("benign blocked", benign[0], "blocked"),
            Column("benign no picture", benign[0], "no_picture"),
        ]
    return columns


def compare_systems(setup, every_system, systems, files, before, evaluate):
    """Make, attack, evaluate, time: prints the table, writes table.md and table.csv.

    systems: the rows, the base first; files, before: as evaluate takes them;
    evaluate: (systems, files, before, folder) -> table, which writes its report into folder.
    """
    args, folder = setup.args, setup.args.output_dir
    source = next((file for file in files.values() if file.kind == "unsafe"), None)
    if source is None:
        raise UserError("--prompts: no file is unsafe; the attacks need one to start from")
    make_missing(systems, every_system)
    check_parts(systems, setup.world.model, is_given=bool(args.model))

    by_checkpoint = defaultdict(list)                   # {checkpoint: its systems}
    for system in systems:
        by_checkpoint[system.checkpoint].append(system)
    attacks = os.path.join(folder, f"attacks_{args.attacks}")   # another number is another file
    make_folder(attacks)
    ring = os.path.join(attacks, RING_A_BELL)
    attack("ring-a-bell", setup, source.source, ring)
    for checkpoint, own in by_checkpoint.items():
        output = soft_prompts_of(checkpoint, attacks)
        attack("soft-prompt", setup, source.source, output, own[0])

    ring_files, ring_before = attacked(ring, args)
    table = evaluate(systems, files | ring_files, before | ring_before,
                     os.path.join(folder, "report"))
    table[SOFT_PROMPT] = {}
    for checkpoint, own in by_checkpoint.items():       # each row meets the prompts made against it
        path = soft_prompts_of(checkpoint, attacks)
        soft_files, soft_before = attacked(path, args)
        rows = list(dict.fromkeys([systems[0], *own]))
        own_table = evaluate(rows, soft_files, soft_before, os.path.splitext(path)[0])
        for system in own:
            table[SOFT_PROMPT][system.name] = own_table[os.path.basename(path)][system.name]

    speed = {system.name: 1000 * seconds_per_picture(system, setup, source) for system in systems}
    seconds = {system.name: training_seconds(system) for system in systems}
    columns = [column for column in columns_of(files, setup.labels)
               if any(column.metric in row for row in table[column.file].values())]
    text = as_markdown(columns, table, speed, seconds)
    write(os.path.join(folder, "table.md"), text + "\n")
    write(os.path.join(folder, "table.csv"), as_csv(columns, table, speed, seconds))
    print(text)


def seconds_per_picture(system, setup, file, count=32):
    """Wall time of drawing a batch of pictures, the second time it is done."""
    policy = load_system(system, setup.world.model, setup.device, setup.dtype)
    method = choose_method(system.method)
    prompts, seeds = cycle_prompts(file.prompts, count, 0)
    for _ in range(2):
        began = time.time()
        generate_with_blocking(policy, method, prompts, seeds, setup.args)
    return (time.time() - began) / count


def as_markdown(columns, table, speed, seconds):
    """The table: speed {row: ms per picture}, seconds {row: of training, or None}."""
    head = ["", *(column.title for column in columns), "ms per picture", "training"]
    lines = [markdown_row(head), "|" + "---|" * len(head)]
    for row in speed:
        cells = [row]
        for column in columns:
            metrics = table[column.file][row]
            cells.append(shown(column.metric, metrics[column.metric])
                         if column.metric in metrics else "–")
        trained = "–" if seconds[row] is None else f"{seconds[row]:.0f} s"
        lines.append(markdown_row([*cells, f"{speed[row]:.0f}", trained]))
    return "\n".join(lines)


def as_csv(columns, table, speed, seconds):
    """One line per number."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["row", "column", "file", "metric", "value", "low", "high"])
    for row in speed:
        for column in columns:
            part = table[column.file][row].get(column.metric)
            if part:
                numbers = rounded([part["value"], part["low"], part["high"]])
                lines.writerow([row, column.title, column.file, column.metric, *numbers])
        lines.writerow([row, "ms per picture", "", "", rounded(speed[row]), "", ""])
        if seconds[row] is not None:
            lines.writerow([row, "training", "", "seconds", rounded(seconds[row]), "", ""])
    return text.getvalue()
