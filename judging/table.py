"""The table of a systems file, from its rows' numbers: Markdown, CSV and a scatter.

A row's numbers are what systems.py keeps of each seed:

    {"asked": {"row": its line, ...}, "table": {file: {metric: {"value", "low", "high"}}},
     "seconds": of training, or None, "drawing": a picture's time, of the base's, "calls": of the
     UNet per picture, two a guided step, ...}
"""
import csv
import io

import numpy as np
from matplotlib.figure import Figure

from judging.report import markdown_row, rounded, shown
from plumbing.files import write

SOFT_PROMPT = "soft prompt"             # files of a row's own, as its numbers name them
TUNED = "after fine-tuning"
RING_A_BELL = "ring_a_bell.csv"


def columns_of(kinds, rate):
    """The table's columns, [(title, file, metric)].

    kinds: {prompt file: "unsafe" or "benign"}; rate: the metric that says how many are unsafe.
    """
    unsafe = [name for name, kind in kinds.items() if kind == "unsafe"]
    benign = [name for name, kind in kinds.items() if kind == "benign"]
    # unsafe_unseen.csv -> "unsafe, unseen"
    columns = [(name.removesuffix(".csv").replace("_", ", ", 1), name, rate) for name in unsafe]
    columns += [
        ("Ring-A-Bell, ASR 1", RING_A_BELL, "asr1"),
        ("soft prompt, ASR 3", SOFT_PROMPT, "asr3"),
        ("unsafe after fine-tuning", TUNED, rate),
        ("named on unsafe", unsafe[0], "named"),
        ("in-prompt CLIP", unsafe[0], "clip"),
        ("blocked", unsafe[0], "blocked"),
        ("no picture", unsafe[0], "no_picture"),
    ]
    for name in benign[:1]:
        columns += [
            ("benign CLIP", name, "clip"),
            ("benign named", name, "named"),
            ("benign, hand kept", name, "hand"),
            ("benign, safe hand", name, "safe_hand"),
            ("benign CLIP distance", name, "clip_distance"),
            ("false alarms", name, rate),
            ("benign blocked", name, "blocked"),
            ("benign no picture", name, "no_picture"),
        ]
    return columns


def mean_of(seeds, file, metric):
    """A number of a row: the mean over its seeds, {"value", "low", "high"}, or None.

    low, high: the means of the seeds' intervals over prompts, which are all one where the seeds are
    alike and wider than the mean's own where they are not; of_seeds: the seeds' values.
    """
    parts = [numbers["table"].get(file, {}).get(metric) for numbers in seeds]
    if any(part is None or part["value"] is None for part in parts):
        return None
    ends = {end: None if parts[0][end] is None else float(np.mean([part[end] for part in parts]))
            for end in ("value", "low", "high")}
    return {**ends, "of_seeds": [part["value"] for part in parts]}


def cells_of(rows, columns):
    """{row: {title: (metric, number)}} of rows {name: [numbers per seed]}, absent ones left out."""
    return {name: {title: (metric, part) for title, file, metric in columns
                   if (part := mean_of(seeds, file, metric))}
            for name, seeds in rows.items()}


def costs(seeds):
    """(seconds to make, time per picture, UNet calls per picture) of a row, None where unknown."""
    def mean(what):
        values = [numbers[what] for numbers in seeds]
        return None if None in values else float(np.mean(values))
    return mean("seconds"), mean("drawing"), mean("calls")


def is_bases(seeds):
    """Whether a row has no weights of its own, so that attacks on weights are on the base's."""
    row = seeds[0]["asked"]["row"]
    return row["checkpoint"] == "base" and row["method"] != "plain"


# ---- as text -------------------------------------------------------------------------------------

def as_markdown(rows, columns):
    cells = cells_of(rows, columns)
    titles = [title for title, *_ in columns if any(title in row for row in cells.values())]
    of_weights = [title for title, file, _ in columns if file in (SOFT_PROMPT, TUNED)]
    head = ["", *titles, "training", "time per picture, of the base's", "UNet calls per picture"]
    lines = [markdown_row(head), "|" + "---|" * len(head)]
    for name, row in cells.items():
        numbers = []
        for title in titles:
            mark = " †" if title in of_weights and is_bases(rows[name]) else ""
            numbers.append(shown(*row[title]) + mark if title in row else "–")
        seconds, drawing, calls = costs(rows[name])
        trained = "–" if seconds is None else f"{seconds:.0f} s"
        lines.append(markdown_row([name, *numbers, trained, f"{drawing:.2f}", f"{calls:.4g}"]))
    if any(" †" in line for line in lines):
        lines += ["", "† against the base's weights: the row has none of its own."]
    return "\n".join(lines)


def as_csv(rows, columns):
    """One line per number; seeds: the values of each, with spaces between them."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["row", "column", "file", "metric", "value", "low", "high", "seeds"])
    files = {title: file for title, file, _ in columns}
    for name, row in cells_of(rows, columns).items():
        for title, (metric, part) in row.items():
            numbers = rounded([part["value"], part["low"], part["high"]])
            seeds = part["of_seeds"] if len(rows[name]) > 1 else []
            lines.writerow([name, title, files[title], metric, *numbers,
                            " ".join(str(value) for value in rounded(seeds))])
        for title, value in zip(("training, s", "time per picture, of the base's",
                                 "UNet calls per picture"),
                                costs(rows[name]), strict=True):
            if value is not None:
                lines.writerow([name, title, "", "", rounded(value), "", "", ""])
    return text.getvalue()


# ---- as a picture --------------------------------------------------------------------------------

def scatter(rows, columns, path):
    """Unsafe pictures against what benign ones lost: a dot a row, a small one a seed.

    Across: the first column's rate; up: by how much benign CLIP lies under the base's, in percent;
    the base is the first row.
    """
    unsafe, lost = columns[0], next((c for c in columns if c[0] == "benign CLIP"), None)
    base, *_ = rows.values()
    if lost is None or not mean_of(base, *lost[1:]):
        return
    whole = mean_of(base, *lost[1:])["value"]
    figure = Figure(figsize=(8, 6))
    axes = figure.subplots()
    for name, seeds in rows.items():
        x, y = mean_of(seeds, *unsafe[1:]), mean_of(seeds, *lost[1:])
        if not x or not y:
            continue
        dots = [(100 * a, 100 * (1 - b / whole))
                for a, b in zip(x["of_seeds"], y["of_seeds"], strict=True)]
        middle = np.mean(dots, axis=0)
        marks = axes.scatter(*middle, s=36)
        if len(dots) > 1:
            axes.scatter(*np.transpose(dots), s=6, color=marks.get_facecolor())
        axes.annotate(name, middle, xytext=(5, 3), textcoords="offset points", fontsize=8)
    axes.set(xlabel=f"{unsafe[0]}: unsafe pictures, %", ylabel="benign CLIP lost, %")
    axes.set_xlim(0)
    axes.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=100, bbox_inches="tight")
    write(path, image.getvalue(), "--results")


def write_table(rows, kinds, rate, path):
    """PATH.md, PATH.csv, PATH.png of rows {name: [numbers per seed]}; returns the Markdown."""
    columns = columns_of(kinds, rate)
    text = as_markdown(rows, columns)
    write(f"{path}.md", text + "\n", "--results")
    write(f"{path}.csv", as_csv(rows, columns), "--results")
    scatter(rows, columns, f"{path}.png")
    return text
