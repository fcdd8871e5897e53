"""Two concepts at once: nudity and faces, each alone, in one run, and as two LoRAs added.

    OMP_NUM_THREADS=1 python results/concepts.py        # -> results/concepts.json, concepts.md

makes what lacks in out/concepts/ and judges the test files, each concept's by its own labels.
Where the numbers are there, the page alone is made anew from them.
"""
import json
import os
import sys

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)

from judging.making import command
from plumbing.checkpoints import LORA_FILE
from results.seeds import spread

FOLDER, SEEDS, PICTURES = "out/concepts", (0, 1, 2), 128
FACES = "FACE_FEMALE,FACE_MALE"
CONCEPTS = {"nudity": ("unsafe", "strict"), "faces": ("people", FACES)}     # (files, labels)
RUNS = {                                # what is trained: options of train.py
    "nudity": ["--prompts", "data/unsafe_train.csv"],
    "faces": ["--prompts", "data/people_train.csv", "--unsafe-labels", FACES],
    "both": ["--prompts", "data/unsafe_train.csv", "data/people_train.csv", "--unsafe-labels",
             f"strict,{FACES}"],
}
ROWS = {                                # of the table: whose LoRAs are added
    "nudity alone": ["nudity"],
    "faces alone": ["faces"],
    "both in one run": ["both"],
    "both LoRAs added": ["nudity", "faces"],
}
SPLITS = ("unseen", "explicit", "never")
BENIGN = "benign_unseen.csv"


def name_of(row, seed):
    """A row's checkpoint as --checkpoint takes it."""
    return "+".join(f"{FOLDER}/{part}_{seed}" for part in ROWS[row])


def make():
    """{concept: {file: {row: [its metrics, a seed each]}}}, the base among the rows."""
    for name, options in RUNS.items():
        for seed in SEEDS:
            folder = f"{FOLDER}/{name}_{seed}"
            if not os.path.exists(os.path.join(folder, LORA_FILE)):
                command(["python", "train.py", *options, "--recipe", "elbo", "--held-out",
                         "--seed", str(seed),
                         "--output-dir", folder])
    checkpoints = {name_of(row, seed): row for row in ROWS for seed in SEEDS}
    found = {}
    for concept, (word, labels) in CONCEPTS.items():
        output = f"{FOLDER}/{concept}"
        command(["python", "evaluate.py", "--checkpoint", *checkpoints, "--unsafe-labels", labels,
                 "--prompts", *(f"data/{word}_{split}.csv" for split in SPLITS),
                 "--benign", f"data/{BENIGN}", "--pictures", str(PICTURES),
                 "--output-dir", output])
        with open(os.path.join(output, "results.json"), encoding="utf-8") as file:
            results = json.load(file)
        found[concept] = {}
        for name, rows in results["table"].items():
            cells = {"base": [rows["base"]]}
            for row, metrics in list(rows.items())[1:]:
                own = checkpoints[results["rows"][row]["checkpoint"]]
                cells.setdefault(own, []).append(metrics)
            found[concept][name] = {row: [{metric: part["value"] for metric, part in one.items()
                                           if is_kept(metric)} for one in seeds]
                                    for row, seeds in cells.items()}
    return {"commit": results["settings"]["commit"], "concepts": found}


def is_kept(metric):
    return metric.startswith("unsafe.") or metric in ("named", "hand", "clip")


def columns_of(concepts):
    """The table's columns, [(title, concept, files whose mean it is, metric)]."""
    rates, names = [], []
    for concept, files in concepts.items():
        own = [name for name in files if name != BENIGN]
        rate = next(iter(files[BENIGN]["base"][0]))     # by the concept's own labels
        rates += [(f"{concept}, {name.removesuffix('.csv').partition('_')[2]}", concept, [name],
                   rate) for name in own]
        names.append((f"{concept}: named right", concept, own, "named"))
    return [*rates, *names, ("benign: named right", concept, [BENIGN], "named"),
            ("benign: hand kept", concept, [BENIGN], "hand"),
            ("benign CLIP, × 100", concept, [BENIGN], "clip")]


def page_of(kept):
    columns = columns_of(kept["concepts"])
    titles = [title for title, *_ in columns]
    lines = [f"| | {' | '.join(titles)} |", "|" + "---|" * (len(titles) + 1)]
    for row in ("base", *ROWS):
        cells = []
        for _, concept, names, metric in columns:
            files = kept["concepts"][concept]
            of_seeds = zip(*(files[name][row] for name in names), strict=True)
            cells.append(spread([np.mean([one[metric] for one in seed]) for seed in of_seeds]))
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return f"""# Two concepts at once

By `python results/concepts.py`, evaluated at commit {kept["commit"]}: `--recipe elbo`, seeds 0, 1
and 2, {PICTURES} pictures of each test file, percent, mean (range). *Nudity* is a strict label at
.3 or more, *faces* FACE_FEMALE or FACE_MALE; each concept's files are judged by its own labels.

""" + "\n".join(lines) + "\n"


def main():
    path = os.path.join(HERE, "concepts.json")
    if not os.path.exists(path):
        kept = make()
        with open(path, "w", encoding="utf-8") as file:
            json.dump(kept, file, indent=1)
            file.write("\n")
    with open(path, encoding="utf-8") as file:
        page = page_of(json.load(file))
    with open(os.path.join(HERE, "concepts.md"), "w", encoding="utf-8") as file:
        file.write(page)
    print(page)


if __name__ == "__main__":
    main()
