"""The rivals in one table: what each defence keeps, costs, and lets through under attack.

    python rivals.py                                  # all rows on the tiny world; what is there already is not made again
    python rivals.py --rows ESD-x "ours + SLD medium"  # some of them

Trains what is missing (erase.py, train.py), makes the attacks (attack.py), evaluates all on the same prompts and seeds
(evaluate.py), times sampling, and writes table.md and the reports into --output-dir.
"""
import argparse
import json
import os
import subprocess
import sys
import time

import evaluate
from prompts import UserError
from report import shown
from sample import make_folder, run

# row -> (checkpoint, guide:words); a checkpoint is made by its command; words and settings are the rivals' best on the training prompts
# (results/log.md); without words it is the names of the emoji
WORDS = "orange, brown, round"
ROWS = {"base": ("base", "plain"), "negative prompt": ("base", "negative:orange"), "SLD weak": ("base", f"sld-weak:{WORDS}, bread"),
        "SLD medium": ("base", f"sld-medium:{WORDS}"), "SLD strong": ("base", f"sld-strong:{WORDS}"), "SLD max": ("base", "sld-max"),
        "SAFREE": ("base", "safree"), "SAFREE, all steps": ("base", f"safree-always:{WORDS}, bread"),
        "ESD-x": ("esd-x", "plain"), "ESD-u": ("esd-u", "plain"), "SDD": ("sdd", "plain"), "SafeGen": ("safegen", "plain"),
        "ours": ("ours", "plain"), "ours + SLD medium": ("ours", "sld-medium")}
COMMANDS = {**{name: ["erase.py", name] for name in ("esd-x", "esd-u", "sdd", "safegen")}, "ours": ["train.py", "--verdict-images", "0"]}
FILES = ["data/unsafe_unseen.csv", "data/unsafe_never.csv", "data/benign_unseen.csv"]
COLUMNS = [("unsafe, unseen", FILES[0], "unsafe.strict"), ("unsafe, never trained", FILES[1], "unsafe.strict"),
           ("Ring-A-Bell, ASR 1", "ring_a_bell.csv", "asr1"), ("soft prompt, ASR 3", "soft", "asr3"), ("named on unsafe", FILES[0], "named"),
           ("in-prompt CLIP", FILES[0], "clip"), ("benign CLIP", FILES[2], "clip"), ("benign named", FILES[2], "named"),
           ("benign CLIP distance", FILES[2], "clip_distance"), ("false alarms", FILES[2], "unsafe.strict")]


def command(*words):
    """One of this repository's programs, its output passed on; seconds."""
    began = time.time()
    print("$ python " + " ".join(words), flush=True)
    if subprocess.run([sys.executable, *words]).returncode:
        raise UserError(f"rivals.py: {words[0]} ended with an error, told above; what is made stands")
    return time.time() - began


def make(folder, checkpoints):
    """Train the checkpoints that are missing; {name: training seconds}, kept beside them."""
    path = os.path.join(folder, "seconds.json")
    seconds = json.load(open(path)) if os.path.exists(path) else {}
    for name in checkpoints:
        if name not in seconds and name != "base":
            seconds[name] = command(*COMMANDS[name], "--output-dir", os.path.join(folder, name))
            with open(path, "w") as file:
                json.dump(seconds, file)
    return seconds


def attack(folder, checkpoints, count):
    """Ring-A-Bell's prompts, once, and for every checkpoint the soft prompts that break it."""
    ring = os.path.join(folder, "ring_a_bell.csv")
    if not os.path.exists(ring):
        command("attack.py", "ring-a-bell", "--prompts", FILES[0], "--count", str(count), "--output", ring)
    for name in checkpoints:
        soft = os.path.join(folder, f"soft_{name}.csv")
        if not os.path.exists(soft):
            own = [] if name == "base" else ["--checkpoint", os.path.join(folder, name)]
            command("attack.py", "soft-prompt", "--prompts", FILES[0], "--count", str(count), "--output", soft, *own)
    return ring


def measure(folder, rows, pictures, *files):
    """evaluate.py on these rows and files: file -> row -> metric."""
    names = {"base" if pair == ("base", "plain") else evaluate_name(*pair): row for row, pair in rows.items()}
    pairs = [f"{'base' if c == 'base' else os.path.join(folder, c)}+{g}" for c, g in rows.values() if (c, g) != ("base", "plain")]
    output = os.path.join(folder, "report" if len(files) > 2 else os.path.splitext(os.path.basename(files[-1]))[0])
    evaluate.main(evaluate.parse_args(["--model", "tiny", "--pictures", str(pictures), "--output-dir", output, *files,
                                       *(["--checkpoint", *pairs] if pairs else ["--checkpoint", "base+plain"])]))
    with open(os.path.join(output, "results.json")) as file:
        table = json.load(file)["table"]
    return {file: {names[row]: found for row, found in cells.items() if row in names} for file, cells in table.items()}


def evaluate_name(checkpoint, guide):
    return checkpoint + f" + {guide}" * (guide != "plain")


def seconds_a_picture(folder, checkpoint, guide, count=32):
    """Wall time of sampling a batch at the tiny world's settings, the second time it is done."""
    from guide import choose_guide
    from model import Policy
    from prompts import read
    from sample import generate, spread
    policy = Policy("tiny", None if checkpoint == "base" else os.path.join(folder, checkpoint))
    prompts, seeds = spread(read(FILES[0])[0], count, 0)
    for _ in range(2):
        began = time.time()
        generate(policy, choose_guide(guide.partition(":")[0]), prompts, seeds, 5, 1., 2., count)
    return (time.time() - began) / count


def main(args):
    unknown = [row for row in args.rows if row not in ROWS]
    if unknown:
        raise UserError(f"--rows: {unknown[0]!r} is unknown; give some of {', '.join(ROWS)}")
    make_folder(args.output_dir)
    folder, rows = args.output_dir, {row: ROWS[row] for row in ["base", *(args.rows or ROWS)]}
    checkpoints = list(dict.fromkeys(checkpoint for checkpoint, _ in rows.values()))
    seconds = make(folder, checkpoints)
    ring = attack(folder, checkpoints, args.attacks)
    table = measure(folder, rows, args.pictures, "--prompts", *FILES[:2], "--benign", FILES[2])
    table |= measure(folder, rows, args.attacks, "--adversarial", ring)
    for checkpoint in checkpoints:                      # the soft prompts made against it
        own = {row: pair for row, pair in rows.items() if pair[0] == checkpoint}
        found = measure(folder, {"base": ("base", "plain"), **own}, args.attacks, "--adversarial", os.path.join(folder, f"soft_{checkpoint}.csv"))
        for row in own:
            table.setdefault("soft", {})[row] = found[f"soft_{checkpoint}.csv"][row]
    lines = ["| | " + " | ".join(title for title, _, _ in COLUMNS) + " | ms a picture | training |", "|---" * (len(COLUMNS) + 3) + "|"]
    for row, (checkpoint, guide) in rows.items():
        cells = [table[os.path.basename(file)][row] for _, file, _ in COLUMNS]
        numbers = [shown(metric, cell[metric]) if metric in cell else "–" for cell, (_, _, metric) in zip(cells, COLUMNS)]
        trained = f"{seconds[checkpoint]:.0f} s" if checkpoint in seconds else "–"
        lines.append(f"| {row} | " + " | ".join(numbers) + f" | {1000 * seconds_a_picture(folder, checkpoint, guide):.0f} | {trained} |")
    text = "\n".join(lines)
    with open(os.path.join(folder, "table.md"), "w") as file:
        file.write(text + "\n")
    print(text)


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Every rival on the tiny world, in one table.")
    p.add_argument("--rows", nargs="+", default=[], help="some of: " + ", ".join(ROWS))
    p.add_argument("--pictures", type=int, default=128, help="pictures a prompt file")
    p.add_argument("--attacks", type=int, default=64, help="adversarial prompts, one picture each")
    p.add_argument("--output-dir", default="out/rivals", help="folder of checkpoints, attacks, reports, table.md")
    return p.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args())
