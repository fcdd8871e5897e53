"""A systems file, row by row: made, attacked, evaluated, timed, and kept, so that nothing is twice.

A systems file is a CSV with a line per row of the table and the columns

    name         the row's
    checkpoint   its weights, as --checkpoint takes them; base for the base model
    method       how its pictures are drawn; plain if left out
    concept      the method's words; the model's if left out
    make         the command that makes the checkpoint, run where its weights are absent
    seeds        of what learns: "0 1 2" makes three systems, in whose checkpoint, make and method
                 the seed stands for {seed}; 0 if left out

Of each row and seed the numbers are written to RESULTS/FILE/NAME_SEED.json. One that is there, of
the same line, prompts and options, is not made again, whatever code and weights have become since
(its commit is in it); delete it and it is. What is absent is made: the checkpoint; Ring-A-Bell's
prompts, once; a soft prompt against the checkpoint; and, where the model's world.json names a task,
the checkpoint fine-tuned on that.
"""
import json
import os
import shlex
import time
from dataclasses import replace

import numpy as np

import rivals
from judging.compare import label_sets
from judging.making import attack, fine_tune, make_missing, slug, to_make, training_seconds
from judging.report import rounded
from judging.rows import (
    System,
    before_attack,
    check_parts,
    first_seed,
    load_system,
    open_file,
)
from judging.setup import commit
from judging.table import RING_A_BELL, SOFT_PROMPT, TUNED, write_table
from plumbing.files import make_folder, write
from plumbing.names import parse_checkpoint, stem
from plumbing.options import UserError
from plumbing.origin import base_hash, sha256_of
from plumbing.remarks import check_words
from plumbing.tables import csv_rows, named, read_text
from plumbing.worlds import read_json
from prompts import cycle_prompts
from sample import choose_method, generate_with_blocking

NEEDED = ("name", "checkpoint")
COLUMNS = (*NEEDED, "method", "concept", "make", "seeds")
KEPT = ("named", "hand", "safe_hand", "clip", "clip_distance", "skin", "blocked", "no_picture",
        "asr1", "asr3")                 # of a row's metrics, beside unsafe. and shows.


# ---- the file ------------------------------------------------------------------------------------

def read_systems(path, names=()):
    """A systems file -> its systems, and those that are asked for, the base first: two lists.

    names: the rows that are asked for; all if empty. UserError where the file can't be used.
    """
    systems = []
    for line, row in read_lines(path):
        where = f"--systems: {path}, line {line}"
        of_seeds = as_systems(row, where)
        if of_seeds[0].name in [other.name for other in systems]:
            raise UserError(f"{where} is the second row named {of_seeds[0].name!r}; rename one")
        systems += of_seeds
    places = {}
    for system in systems:
        other = places.setdefault(file_name(system), system)
        if other is not system:
            raise UserError(f"--systems: {path}: the rows {other.name!r} and {system.name!r} would "
                            f"both be kept in {file_name(system)}.json; rename one")
    known = {system.name: system for system in systems}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"--rows: {unknown[0]!r} is unknown; give some of {', '.join(known)}")
    asked = [system for name in names for system in systems if system.name == name] or systems
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


def as_systems(row, where):
    """A line of a systems file, {column: text}, as a System of each of its seeds."""
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
    concept = cell["concept"] or checkpoint.concept
    try:
        seeds = [int(word) for word in cell["seeds"].split()] or [0]
    except ValueError:
        raise UserError(f"{where} has the seeds {cell['seeds']!r}; whole numbers with spaces "
                        "between them are needed") from None
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{where} has a seed twice; leave one out")
    differs = [column for column in ("checkpoint", "method", "make") if "{seed}" in cell[column]]
    if len(seeds) > 1 and (not differs or ("checkpoint" in differs) != ("make" in differs) and
                           cell["make"]):
        raise UserError(f"{where} has {len(seeds)} seeds, and no {{seed}} in its checkpoint and "
                        "make, or in its method, where they differ")

    def of(text, seed):
        return text.replace("{seed}", str(seed))
    systems = [System(tuple((of(path, seed), weight) for path, weight in checkpoint.parts),
                      of(method, seed), concept, cell["name"], of(cell["make"], seed), seed)
               for seed in seeds]
    for system in systems:
        rivals.find_method(system.method, f"{where}: method")
        check_words(system.method, concept, f"{where}: concept")
    return systems


# ---- a row ---------------------------------------------------------------------------------------

def row_path(setup, system):
    """Where a row's numbers lie: results/systems/ESD-x_0.json."""
    return os.path.join(rows_folder(setup.args), f"{file_name(system)}.json")


def rows_folder(args):
    return os.path.join(args.results, stem(args.systems))


def file_name(system):
    return f"{slug(system.name)}_{system.seed}"


def asked_of(setup, system, files):
    """What a row's numbers were asked for: its line, the prompts, the options."""
    args, world = setup.args, setup.world
    options = ("attacks", "recipe", "steps", "eta", "guidance", "resolution", "seed", "rule",
               "channels", "clip", "clip_judge")
    return json.loads(json.dumps({
        "row": {"checkpoint": system.checkpoint, "method": system.method,
                "concept": system.concept, "make": system.make},
        "base": base_hash(world.model),
        "files": {name: file.sha256 for name, file in files.items()},
        "labels": setup.labels,
        "task": sha256_of(world.task) if world.task and args.attacks else None,
        "options": {option: getattr(args, option) for option in options},
    }))


def finished(setup, system, files):
    """A row's numbers, where they are there and of what is asked; else None."""
    path = row_path(setup, system)
    if not os.path.exists(path):
        return None
    numbers = read_json(path, "--results")
    return numbers if numbers.get("asked") == asked_of(setup, system, files) else None


def make_row(setup, system, base, every_system, files, before, evaluate):
    """Make, attack, evaluate and time a row; its numbers."""
    args, began, asked = setup.args, time.time(), asked_of(setup, system, files)
    folder = os.path.join(args.output_dir, file_name(system))
    source = unsafe_file(files)
    make_missing(system, every_system)
    check_parts([system], setup.world.model, is_given=bool(args.model))
    # another number of prompts is another file
    attacks = os.path.join(args.output_dir, f"attacks_{args.attacks}")
    own_names, tuned = {}, None
    if args.attacks:
        make_folder(attacks)
        ring = os.path.join(attacks, RING_A_BELL)
        attack("ring-a-bell", setup, source.source, ring)
        soft = os.path.join(attacks, f"soft_{slug(system.checkpoint)}.csv")
        attack("soft-prompt", setup, source.source, soft, system)
        own_names[os.path.basename(soft)] = SOFT_PROMPT
        for path in (ring, soft):
            more, more_before = attacked(path, args)
            files, before = files | more, before | more_before
        if setup.world.task:
            tuned = fine_tune(setup, system, os.path.join(args.output_dir, "tuned"))
    rows = list(dict.fromkeys([base, system]))
    table = evaluate(rows, files, before, folder)
    kept = {own_names.get(name, name): of_row[system.name] for name, of_row in table.items()
            if not name.endswith("before the attack")}
    if tuned:
        parts = (*system.parts, (tuned, 1.))
        other = replace(system, parts=parts, name=f"{system.name}, {TUNED}")
        found = evaluate([base, other], {source.name: source}, {}, os.path.join(folder, "tuned"))
        kept[TUNED] = found[source.name][other.name]
    drawing, calls = cost_of_a_picture(system, base, setup, source)
    return rounded({
        "name": system.name,
        "seed": system.seed,
        "asked": asked,
        "commit": commit(),
        "seconds": training_seconds(system),
        "drawing": drawing,
        "calls": calls,
        "seconds_in_all": time.time() - began,
        "table": {name: {metric: part for metric, part in metrics.items() if is_kept(metric)}
                  for name, metrics in kept.items()},
    })


def is_kept(metric):
    return metric in KEPT or metric.startswith(("unsafe.", "shows."))


def unsafe_file(files):
    """The first unsafe file, from which attacks start."""
    found = next((file for file in files.values() if file.kind == "unsafe"), None)
    if found is None:
        raise UserError("--prompts: no file is unsafe; the attacks need one to start from")
    return found


def attacked(path, args):
    """An attack's prompts as {name: File}, with those before it, and {file: the file before}."""
    seed = first_seed(args.seed)
    file = open_file(path, "adversarial", args.attacks, option="--adversarial", seed=seed)
    plain = before_attack(file)
    if plain is None:
        return {file.name: file}, {}
    return {plain.name: plain, file.name: file}, {file.name: plain.name}


def cost_of_a_picture(system, base, setup, file, count=16, repeats=3):
    """(time, UNet calls) per picture; the time as a multiple of the base's.

    Batches are drawn in turn with the base's, so that what else the machine does falls on both; of
    each the fastest counts, by the CPU's own time where that is what draws. A guided step is two
    calls. The way back of a gradient is not counted as calls, what is computed anew for it is.
    """
    prompts, seeds = cycle_prompts(file.prompts, count, 0)
    methods = [choose_method(one.method) for one in (base, system)]
    policies = [load_system(one, setup.world.model, setup.device, setup.dtype)
                for one in (base, system)]
    clock = time.process_time if setup.device == "cpu" else time.perf_counter
    asked, seconds = 0, [[], []]

    def note(unet, inputs, options):
        nonlocal asked
        asked += len(inputs[0] if inputs else options["sample"])
    for _ in range(repeats):
        for policy, method, of_one in zip(policies, methods, seconds, strict=True):
            asked, began = 0, clock()
            with policy.unet.register_forward_pre_hook(note, with_kwargs=True):
                generate_with_blocking(policy, method, prompts, seeds, setup.args)
            of_one.append(clock() - began)
    return min(seconds[1]) / min(seconds[0]), asked / count


# ---- all rows ------------------------------------------------------------------------------------

def compare_systems(setup, every_system, systems, files, before, evaluate):
    """Make the rows that lack, then the table of all that are there: prints it and writes it.

    systems: the rows that are asked for, the base first; files, before: as evaluate takes them;
    evaluate: (systems, files, before, folder) -> table, which writes its report into folder.
    """
    args = setup.args
    unsafe_file(files)
    folder = rows_folder(args)
    path = os.path.join(args.results, stem(args.systems))
    if os.path.realpath(f"{path}.csv") == os.path.realpath(args.systems):
        raise UserError(f"--results: {path}.csv would replace the systems file; give another "
                        "folder")
    make_folder(folder, "--results")
    missing = [system for system in systems if not finished(setup, system, files)]
    to_make(missing, every_system)                      # complain before an hour of training
    say_hours(setup, systems, missing)
    for system in missing:
        numbers = make_row(setup, system, systems[0], every_system, files, before, evaluate)
        write(row_path(setup, system), json.dumps(numbers, indent=1) + "\n", "--results")

    rows, absent = {}, []
    for system in dict.fromkeys([systems[0], *every_system]):
        numbers = finished(setup, system, files)
        if numbers:
            rows.setdefault(system.name, []).append(numbers)
        else:
            absent.append(f"{system.name} {system.seed}")
    kinds = {name: file.kind for name, file in files.items() if file.source}
    print(write_table(rows, kinds, f"unsafe.{next(iter(label_sets(setup.labels)))}", path))
    if absent:
        print(f"not finished: {', '.join(absent)}")


def say_hours(setup, systems, missing):
    """What is about to be made, and for how long, as what is there took."""
    if not missing:
        return
    took = [read_json(row_path(setup, system), "--results").get("seconds_in_all", 0)
            for system in systems if os.path.exists(row_path(setup, system))]
    hours = f"some {np.mean(took) * len(missing) / 3600:.1f} hours, as those there took" \
        if took else "none is there to say how long a row takes"
    print(f"{len(missing)} of {len(systems)} rows and seeds are to be made: {hours}", flush=True)
