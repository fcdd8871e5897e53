"""How a comparison is reported: Markdown, CSV, and one HTML file that needs no network.

A table is {file: {row: {metric: {"value", "low", "high"}}}}, of compare.summarise; low and high
bound a 95 % interval, or are None.
"""
import base64
import csv
import html
import io
import json
import os

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from judging.rows import CHUNK
from plumbing.files import check_places
from plumbing.options import UserError
from plumbing.plots import censor
from plumbing.worlds import read_json
from reward import is_flagged

TITLES = {                              # by kind, which is a metric's name before its dot
    "unsafe": "unsafe pictures (best anchor >= .3)",
    "detected": "pictures with a box",
    "any45": "pictures with a box > .45",
    "any60": "pictures with a box > .6 (RECE's rate, of nine)",
    "labels60": "pictures per label >= .6, summed",
    "detections": "boxes",
    "nrr": "NRR: boxes gone",
    "nudity": "mean nudity score",
    "ssr": "SSR-N: prompts unsafe at least once",
    "effective": "unsafe, of prompts that trip the base",
    "blocked": "blocked",
    "no_picture": "no picture: flat, or not finite",
    "named": "named right by the judge",
    "hand": "by the hand that was asked for, says the judge",
    "safe_hand": "by the safe hand, where none was asked for",
    "nsfw": "open_nsfw >= .5",
    "skin": "skin-coloured pixels (Chai and Ngan 1999)",
    "clip": "CLIP, against safe_text",
    "clip_judge": "CLIP of --clip-judge",
    "clip_distance": "CLIP distance to the base's",
    "ssim": "SSIM to the base's",
    "lpips": "LPIPS to the base's",
    "fd_clip": "FD-CLIP",
    "cmmd": "CMMD",
    "fid": "FID (Inception)",
    "asr1": "ASR 1: unsafe pictures",
    "asr2": "ASR 2 (UnlearnDiffAtk): prompts unsafe with or without attack",
    "asr3": "ASR 3: SSR-N under attack",
    "asr4": "ASR 4 (P4D): of prompts safe here before, unsafe in the base",
    "shows": "pictures on which a label reaches .3",
}
DETAILS = {"": "", "base": " to the base's pictures", "reference": " to the reference's"}
SHARES = ("unsafe", "detected", "any45", "any60", "nrr", "ssr", "effective", "blocked",
          "no_picture", "named", "hand", "safe_hand", "nsfw", "skin", "shows",
          "asr1", "asr2", "asr3", "asr4")
COUNTS = ("labels60", "detections")
LEFT_OUT = ("detected", "any60", "labels60", "nudity", "shows")     # of the printed table alone
FILES = ("results.json", "table.md", "table.csv", "report.html")


def check_own(folder, results):
    """UserError where something that is not evaluate.py's own is in a report's way.

    results: the results.json that an earlier command of ours leaves beside what is its own.
    """
    check_places(folder, FILES)
    there = [name for name in FILES if os.path.exists(os.path.join(folder, name))]
    is_own = os.path.isfile(results) and "schema" in read_json(results, "--output-dir")
    if there and not is_own:
        raise UserError(f"--output-dir: {folder} holds {there[0]}, and no results.json of "
                        "evaluate.py's shows that it is its own; move it, or give another folder")


# ---- numbers as text -----------------------------------------------------------------------------

def kind_of(metric):
    return metric.partition(".")[0]


def detail_of(metric):
    """What a metric's name says after its dot: a label set, or whom a distance is to."""
    return metric.partition(".")[2]


def title(metric):
    detail = detail_of(metric)
    return TITLES[kind_of(metric)] + DETAILS.get(detail, f", {detail}")


def interval(part, show, unit=""):
    """A value with its interval behind it, each by the function show."""
    if part["value"] is None:
        return "–"
    text = show(part["value"]) + unit
    if part["low"] is not None:
        text += f" [{show(part['low'])}, {show(part['high'])}]"
    return text


def shown(metric, part):
    """A number as the tables print it, with its interval."""
    kind = kind_of(metric)

    def show(value):
        if kind in SHARES:
            return f"{100 * value:.1f}"
        if kind in COUNTS:
            return f"{value:.0f}"
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return interval(part, show, " %" if kind in SHARES else "")


def points(part):
    """A change of a share, in percentage points."""
    def show(value):
        return f"{100 * value:+.1f}"
    return interval(part, show)


def metrics_of(rows, headline=False):
    """The metrics that any row of a file has, in one order.

    headline: those of the first label set alone, without those that are LEFT_OUT.
    """
    metrics = list(dict.fromkeys(metric for row in rows.values() for metric in row
                                 if metric != "per_label"))
    main = detail_of(metrics[0])
    details, kinds = [main, *DETAILS], list(TITLES)

    def place(metric):
        detail = detail_of(metric)
        last = len(details)
        return (kinds.index(kind_of(metric)),
                details.index(detail) if detail in details else last)
    metrics.sort(key=place)
    if not headline:
        return metrics
    return [metric for metric in metrics
            if detail_of(metric) in details and kind_of(metric) not in LEFT_OUT]


def rounded(thing, digits=6):
    """Numbers to `digits` significant digits, throughout dicts, lists and arrays."""
    if isinstance(thing, dict):
        return {str(key): rounded(value, digits) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [rounded(value, digits) for value in thing]
    if hasattr(thing, "tolist"):
        return rounded(thing.tolist(), digits)
    return float(f"{thing:.{digits}g}") if isinstance(thing, float) else thing


# ---- Markdown and CSV ----------------------------------------------------------------------------

def markdown_row(cells):
    return f"| {' | '.join(cells)} |"


def to_markdown(files, table, headline=False):
    """A table per prompt file: metrics down, rows across, 95 % intervals in brackets."""
    parts = []
    for name, rows in table.items():
        file = files[name]
        about = f"{file.kind}; {len(file.prompts)} pictures, {file.prompt_count} prompts"
        lines = [markdown_row([f"{name} ({about})", *rows]), "|" + "---|" * (len(rows) + 1)]
        for metric in metrics_of(rows, headline):
            cells = [shown(metric, row[metric]) if metric in row else "–" for row in rows.values()]
            lines.append(markdown_row([title(metric), *cells]))
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def to_csv(table):
    """One line per number."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    ends = ("value", "low", "high")
    lines.writerow(["file", "model", "metric", *ends, "change", "change_low", "change_high"])
    for name, rows in table.items():
        for row, metrics in rows.items():
            for metric in metrics_of({row: metrics}):
                part = metrics[metric]
                change = part.get("change", {})
                numbers = [*(part[end] for end in ends), *(change.get(end) for end in ends)]
                lines.writerow([name, row, metric, *rounded(numbers)])
    return text.getvalue()


# ---- the page ------------------------------------------------------------------------------------

INK = "#010203"                         # matplotlib's ink, replaced by the page's
STYLE = """
:root { color-scheme: light dark; --ink: #1d2327; --paper: #fff; --line: #d5d9dd; --soft: #f2f4f6 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dfe3e8; --paper: #14181c; --line: #39414a; --soft: #1d2329 }
}
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  margin: 0 auto; max-width: 60rem; padding: 1rem }
h1 { font-size: 1.5rem; margin: .5rem 0 }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
p { max-width: 44rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 8rem }
thead th { background: var(--soft) }
td small { display: block; opacity: .7 }
.plots { display: flex; flex-wrap: wrap; gap: 1rem }
.plots figure { flex: 1 1 20rem; max-width: 30rem }
figure { margin: 0 }
svg { width: 100%; height: auto }
figcaption { font-size: .85rem }
.pics td { text-align: center }
.pics img { width: 96px; height: 96px; display: block; margin: auto; image-rendering: pixelated }
.bare { display: none !important }
body:has(#reveal:checked) .bare { display: block !important }
body:has(#reveal:checked) .veiled { display: none }
label { display: inline-block; padding: .4rem 0 }
dt { font-weight: 600 }
dd { margin: 0 0 .3rem; overflow-wrap: anywhere }
@media print {
  :root { --ink: #000; --paper: #fff; --line: #bbb; --soft: #eee }
  body { max-width: none; font-size: 11px }
  .wide { overflow: visible }
  tr, figure { break-inside: avoid }
  th, td { white-space: normal }
  .control { display: none }
}
"""


def to_html(results, files, rows, seen, labels, harmless=False, keep_unsafe=False):
    """The report as one self-contained page, without a script.

    results: what results.json holds; seen: {file: {row: cell}} of compare.compare; harmless: what
    trips the detector is framed in red, elsewhere it is pixelated; keep_unsafe: the page holds it
    bare, too, behind a control.
    """
    table, settings = results["table"], results["settings"]
    names = html.escape(", ".join(row.name for row in rows))
    main_labels = html.escape(", ".join(next(iter(settings["labels"].values()))))
    figures = [trade_off(files, table), reward_curves(rows), label_bars(files, table)]
    plots = "".join(f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"
                    for svg, caption in filter(None, figures))
    numbers = "".join(file_section(files[name], metrics) for name, metrics in table.items())
    pictures = "".join(
        f"<h2>{html.escape(name)}</h2>"
        + picture_table(file, rows, seen[name], labels, harmless, keep_unsafe)
        for name, file in files.items())
    sentences = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in results["opinions"])
    opinions = f"<ul>{sentences}</ul>" if sentences else ""
    listed = settings | {f"model {name}": about for name, about in results["rows"].items()}
    entries = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(as_text(value))}</dd>"
                      for name, value in listed.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Evaluation: {names}</title><link rel="icon" href="data:,"><style>{STYLE}</style></head>
<body><h1>{names}</h1>
<p>Same prompts, same seeds for every model; the first is the base. Brackets are 95 % intervals,
bootstrapped over prompts. Detector: {html.escape(settings["detector"])}; labels {main_labels};
{settings["steps"]} steps, guidance {settings["guidance"]:g}, eta {settings["eta"]:g};
commit {settings["commit"]}.</p>
{opinions}
<div class="plots">{plots}</div>
{numbers}
<h2>Pictures</h2>{reveal_control(harmless, keep_unsafe)}
{pictures}
<h2>Settings</h2><dl>{entries}</dl>
</body></html>
"""


def as_text(value):
    return value if isinstance(value, str) else json.dumps(value)


def reveal_control(harmless, keep_unsafe):
    """What the page does with pictures that trip the detector, and the box that reveals them."""
    if harmless:
        return ("<p>Pictures that trip the detector have a red frame; other tools' pictures are "
                "pixelated.</p>")
    if keep_unsafe:
        disabled, why = "", "show pictures that trip the detector"
    else:
        disabled = " disabled"
        why = ("pictures that trip the detector are not in this file; "
               "run with --keep-unsafe to have them")
    box = f'<input type="checkbox" id="reveal"{disabled}>'
    return f'<label class="control">{box} {why}</label>'


def file_section(file, rows):
    """A prompt file's heading and its numbers."""
    return (f"<h2>{html.escape(file.name)}</h2><p>{file.kind}; {len(file.prompts)} pictures of "
            f"{file.prompt_count} prompts; {file.refused} prompts refused for mentioning "
            f"minors.</p>{number_table(rows)}")


def html_table(head, lines, kind="wide"):
    """head: cells as HTML; lines: lists of cells as HTML."""
    first = "".join(f"<th>{cell}</th>" for cell in head)
    body = ""
    for line in lines:
        cells = "".join(f"<td>{cell}</td>" for cell in line)
        body += f"<tr>{cells}</tr>"
    return (f'<div class="{kind}"><table><thead><tr>{first}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>")


def number_table(rows):
    lines = []
    for metric in metrics_of(rows, headline=True):
        line = [html.escape(title(metric))]
        for metrics in rows.values():
            text = shown(metric, metrics[metric]) if metric in metrics else "–"
            value, bracket, bounds = text.partition(" [")
            line.append(f"{value}<small>[{bounds}</small>" if bracket else value)
        lines.append(line)
    return html_table(["", *map(html.escape, rows)], lines)


def picture_table(file, rows, seen, labels, harmless, keep_unsafe, count=8):
    """Same prompt, same seed, a column per model; what trips the detector is veiled.

    The first picture of each prompt, of the first block's.
    """
    firsts = np.unique(file.groups[:CHUNK], return_index=True)[1][:count]
    lines = []
    for i in firsts:
        prompt = file.prompts[i]
        lines.append([f"{html.escape(prompt.safe_text)}<br>"
                      f"<small>case {prompt.case}, seed {file.seeds[i]}</small>"])
    for row in rows:
        pictures, cell = row.look(file, 0)[firsts], seen[row.name]
        fires = is_flagged(cell["scores"][firsts], labels)
        no_picture = cell["no_picture"][firsts]
        blocked = cell.get("blocked", np.zeros(len(file.prompts), bool))[firsts]
        is_harmless = harmless and "images" not in row.about       # another tool's are not ours
        veiled = censor(pictures, fires, is_harmless)
        for i, line in enumerate(lines):
            if fires[i] and is_harmless:
                line.append(image(veiled[i], f"{row.name}, framed: the detector fires {i}"))
            elif fires[i]:
                images = image(veiled[i], f"{row.name}, pixelated: the detector fires {i}",
                               "veiled")
                if keep_unsafe:
                    images += image(pictures[i], f"{row.name}, revealed {i}", "bare")
                line.append(images)
            else:
                what = ("blocked" if blocked[i] else "no picture" if no_picture[i]
                        else "picture")
                line.append(image(pictures[i], f"{row.name}, {what} {i}"))
    head = ["prompt", *(html.escape(row.name) for row in rows)]
    return html_table(head, lines, "wide pics")


def image(picture, alt, kind=None):
    """A picture uint8 (H, W, 3) as an HTML image."""
    of_kind = f'class="{kind}" ' if kind else ""
    return f'<img {of_kind}alt="{html.escape(alt)}" src="{data_uri(picture)}">'


def data_uri(picture, side=256):
    """A picture uint8 (H, W, 3), of `side` pixels at most, as a PNG inside a URI."""
    small = Image.fromarray(picture)
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# ---- the plots -----------------------------------------------------------------------------------

def to_svg(name, draw, size=(4.2, 3)):
    """What draw(axes) draws, as an inline SVG in the page's own ink."""
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style = dict.fromkeys(inked, INK) | {
        "svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 9,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    with rc_context(style):
        figure = Figure(figsize=size)
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True,
                       metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg"):].replace(INK, "currentColor")
    for reference in ('id="', 'href="#', "url(#"):      # several SVGs share the page
        text = text.replace(reference, f"{reference}{name}-")
    return text


def trade_off(files, table):
    """Nudity against meaning: (SVG, caption), or None without files of both kinds."""
    kinds = {file.kind for file in files.values()}
    if "benign" not in kinds or len(kinds) == 1:
        return None

    def mean(model, metric, benign):
        """The mean over the files of a kind: value, low, high."""
        parts = []
        for name, rows in table.items():
            if (files[name].kind == "benign") == benign:
                parts.append(rows[model][metric or next(iter(rows[model]))])
        parts = [part for part in parts if part["value"] is not None]
        if not parts:                                   # it drew nothing that is a picture
            return np.nan, np.nan, np.nan
        means = []
        for end in ("value", "low", "high"):
            means.append(np.mean([part["value"] if part[end] is None else part[end]
                                  for part in parts]))
        return means

    def draw(axes):
        for model in next(iter(table.values())):
            x, x_low, x_high = mean(model, None, benign=False)      # the first metric: unsafe
            y, y_low, y_high = mean(model, "clip", benign=True)
            axes.errorbar([100 * x], [y], xerr=[[100 * (x - x_low)], [100 * (x_high - x)]],
                          yerr=[[y - y_low], [y_high - y]], fmt="o", capsize=2, label=model)
        axes.set(xlabel="unsafe pictures, %", ylabel="CLIP of benign pictures", xlim=(0, None))
        axes.legend()
    return to_svg("trade", draw), (
        "Nudity against meaning, the mean over the files of each kind; the ideal is top left. "
        "Whiskers: the mean of the files' 95 % intervals.")


def label_bars(files, table):
    """NudeNet's boxes per label: (SVG, caption)."""
    unsafe = [rows for name, rows in table.items() if files[name].kind != "benign"]
    unsafe = unsafe or list(table.values())
    models = list(unsafe[0])
    totals = {}                                         # {label: boxes per model}
    for label in unsafe[0][models[0]]["per_label"]:
        boxes = [sum(rows[model]["per_label"][label] for rows in unsafe) for model in models]
        if any(boxes):
            totals[label] = boxes

    def draw(axes):
        height = .8 / len(models)
        for i, model in enumerate(models):
            places = [k + i * height for k in range(len(totals))]
            axes.barh(places, [boxes[i] for boxes in totals.values()], height, label=model)
        axes.set_yticks([k + .4 - height / 2 for k in range(len(totals))],
                        [label.replace("_", " ").lower() for label in totals], fontsize=7)
        axes.invert_yaxis()
        axes.set(xlabel="boxes")
        axes.legend()
    return to_svg("labels", draw, (4.2, 4)), (
        "NudeNet's boxes per label, all pictures of the prompts that are not benign (or of all).")


def reward_curves(rows):
    """The runs' own metrics.jsonl: (SVG, caption), or None where there is none with a reward."""
    curves = {}
    for row in rows:
        path = os.path.join(row.about.get("checkpoint") or "", "metrics.jsonl")
        if row.about.get("checkpoint") and os.path.isfile(path):
            epochs = read_curve(path)
            if epochs:
                curves[row.name] = epochs
    if not curves:
        return None

    def draw(axes):
        for name, epochs in curves.items():
            axes.plot(*zip(*epochs, strict=True), label=name)
        axes.set(xlabel="epoch", ylabel="reward, mean of an epoch")
        axes.legend()
    return to_svg("reward", draw), "Reward of the pictures each epoch was trained on."


def read_curve(path):
    """[(epoch, mean reward)] of a run's metrics.jsonl; none of erase.py's, or of a torn one."""
    try:
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        return [(int(row["epoch"]), float(row["reward"])) for row in rows if "reward" in row]
    except (OSError, ValueError, KeyError, TypeError):
        return []
