"""How a comparison is told: Markdown, CSV, and one HTML file that needs no network.

table is {file: {model: {metric: {"value", "low", "high"}}}} of compare.summarise; low and high bound a 95 %
interval, or are None.
"""
import base64
import csv
import html
import io
import json
import os

TITLES = {
    "unsafe": "unsafe pictures (best anchor >= .3)", "detected": "pictures with a box", "any45": "pictures with a box > .45",
    "labels60": "pictures per label >= .6, summed", "detections": "boxes", "nrr": "NRR: boxes gone",
    "nudity": "mean nudity score", "ssr": "SSR-N: prompts unsafe at least once", "effective": "unsafe, of prompts that trip the base",
    "named": "named right by the judge", "nsfw": "open_nsfw >= .5", "clip": "CLIP, against safe_text",
    "clip_judge": "CLIP of --clip-judge", "clip_distance": "CLIP distance to the base's", "ssim": "SSIM to the base's",
    "lpips": "LPIPS to the base's", "fd_clip": "FD-CLIP", "cmmd": "CMMD", "fid": "FID (Inception)",
    "asr1": "ASR 1: unsafe pictures", "asr2": "ASR 2 (UnlearnDiffAtk): prompts unsafe with or without attack",
    "asr3": "ASR 3: SSR-N under attack", "asr4": "ASR 4 (P4D): of prompts safe here before, unsafe in the base"}
SHARES = ("unsafe", "detected", "any45", "nrr", "ssr", "effective", "named", "nsfw", "asr1", "asr2", "asr3", "asr4")
COUNTS = ("labels60", "detections")
LEFT_OUT = ("detected", "labels60", "nudity")           # of the printed table; the files have them
INK = "#010203"                                         # matplotlib's ink, replaced by the page's


# ---- numbers as text -------------------------------------------------------------------------------------

def title(metric):
    kind, _, detail = metric.partition(".")
    return TITLES[kind] + {"": "", "base": " to the base's pictures", "reference": " to the reference's"}.get(detail, f", {detail}")


def interval(part, show, unit=""):
    if part["value"] is None:
        return "–"
    return show(part["value"]) + unit + ("" if part["low"] is None else f" [{show(part['low'])}, {show(part['high'])}]")


def shown(metric, part):
    """A number as the tables print it, with its interval."""
    kind = metric.partition(".")[0]
    if kind in SHARES:
        return interval(part, lambda v: f"{100 * v:.1f}", " %")
    return interval(part, lambda v: f"{v:.0f}" if kind in COUNTS else f"{v:.3f}" if abs(v) < 10 else f"{v:.1f}")


def points(part):
    """A change of a share, in percentage points."""
    return interval(part, lambda v: f"{100 * v:+.1f}")


def metrics_of(rows, headline=False):
    """The metrics that any model of a file has, in one order; headline: those of the first label set alone."""
    order = list(dict.fromkeys(m for row in rows.values() for m in row if m != "per_label"))
    main = order[0].partition(".")[2]
    keep = (main, "", "base", "reference")
    rank = {kind: i for i, kind in enumerate(TITLES)}
    order.sort(key=lambda m: (rank[m.partition(".")[0]], keep.index(m.partition(".")[2]) if m.partition(".")[2] in keep else 9))
    if not headline:
        return order
    return [m for m in order if m.partition(".")[2] in keep and m.partition(".")[0] not in LEFT_OUT]


def to_markdown(files, table, headline=False):
    """A table a prompt file: metrics down, models across, 95 % intervals in brackets."""
    lines = []
    for name, rows in table.items():
        file = files[name]
        lines += ["", f"| {name} ({file.kind}; {len(file.prompts)} pictures, {file.groups.max() + 1} prompts) | "
                  + " | ".join(rows) + " |", "|---|" + "---|" * len(rows)]
        lines += [f"| {title(m)} | " + " | ".join(shown(m, row[m]) if m in row else "–" for row in rows.values()) + " |"
                  for m in metrics_of(rows, headline)]
    return "\n".join(lines[1:])


def to_csv(table):
    """One line a number."""
    text = io.StringIO()
    write = csv.writer(text, lineterminator="\n").writerow
    write("file model metric value low high change change_low change_high".split())
    for name, rows in table.items():
        for row, found in rows.items():
            for metric in metrics_of({row: found}):
                parts = found[metric], found[metric].get("change", {})
                write([name, row, metric, *(rounded(part.get(k)) for part in parts for k in ("value", "low", "high"))])
    return text.getvalue()


def rounded(thing, digits=6):
    """Numbers to `digits` significant digits, all through dicts, lists and arrays."""
    if isinstance(thing, dict):
        return {str(k): rounded(v, digits) for k, v in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [rounded(v, digits) for v in thing]
    if hasattr(thing, "tolist"):
        return rounded(thing.tolist(), digits)
    return float(f"{thing:.{digits}g}") if isinstance(thing, float) else thing


# ---- the page --------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --ink: #1d2327; --paper: #fff; --line: #d5d9dd; --soft: #f2f4f6; --mark: #1f6feb }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe3e8; --paper: #14181c; --line: #39414a; --soft: #1d2329; --mark: #6ea8ff } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto; max-width: 60rem; padding: 1rem }
h1 { font-size: 1.5rem; margin: .5rem 0 } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
p { max-width: 44rem } .wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 8rem }
thead th { background: var(--soft) } td small { display: block; opacity: .7 }
.plots { display: flex; flex-wrap: wrap; gap: 1rem } .plots figure { flex: 1 1 20rem; max-width: 30rem }
figure { margin: 0 } svg { width: 100%; height: auto } figcaption { font-size: .85rem }
.pics td { text-align: center } .pics img { width: 96px; height: 96px; display: block; margin: auto; image-rendering: pixelated }
.bare { display: none !important }
body:has(#reveal:checked) .bare { display: block !important } body:has(#reveal:checked) .veiled { display: none }
label { display: inline-block; padding: .4rem 0 } dt { font-weight: 600 } dd { margin: 0 0 .3rem; overflow-wrap: anywhere }
@media print { :root { --ink: #000; --paper: #fff; --line: #bbb; --soft: #eee } body { max-width: none; font-size: 11px }
  .wide { overflow: visible } tr, figure { break-inside: avoid } th, td { white-space: normal } .control { display: none } }
"""


def to_svg(name, draw, size=(4.2, 3)):
    """What draw(axes) draws, as an inline SVG in the page's own ink."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    ink = {key: INK for key in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")}
    with plt.rc_context({**ink, "svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 9,
                         "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}):
        figure, axes = plt.subplots(figsize=size)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg"):].replace(INK, "currentColor").replace('id="', f'id="{name}-')
    return text.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")


def trade_off(files, table):
    """Nudity against meaning: mean unsafe rate of the unsafe files, mean CLIP of the benign ones."""
    def draw(axes):
        import numpy as np
        models = list(next(iter(table.values())))
        for model in models:
            spots = []
            for kinds, metric in ((("unsafe", "adversarial"), None), (("benign",), "clip")):
                parts = [rows[model][metric or next(iter(rows[model]))] for f, rows in table.items() if files[f].kind in kinds]
                spots.append([np.mean([p[k] if p[k] is not None else p["value"] for p in parts]) for k in ("value", "low", "high")])
            (x, x0, x1), (y, y0, y1) = spots
            axes.errorbar([100 * x], [y], xerr=[[100 * (x - x0)], [100 * (x1 - x)]], yerr=[[y - y0], [y1 - y]], fmt="o", capsize=2, label=model)
        axes.set(xlabel="unsafe pictures, %", ylabel="CLIP of benign pictures", xlim=(0, None))
        axes.legend()
    if {"benign"} < {f.kind for f in files.values()}:
        return to_svg("trade", draw), ("Nudity against meaning, the mean over the files of each kind; the ideal is top left. "
                                       "Whiskers: the mean of the files' 95 % intervals.")


def label_bars(files, table):
    def draw(axes):
        unsafe = [rows for f, rows in table.items() if files[f].kind != "benign"] or list(table.values())
        models = list(unsafe[0])
        totals = {m: {label: sum(rows[m]["per_label"][label] for rows in unsafe) for label in unsafe[0][m]["per_label"]} for m in models}
        labels = [label for label in totals[models[0]] if any(totals[m][label] for m in models)]
        height = .8 / len(models)
        for i, model in enumerate(models):
            axes.barh([k + i * height for k in range(len(labels))], [totals[model][label] for label in labels], height, label=model)
        axes.set_yticks([k + .4 - height / 2 for k in range(len(labels))], [label.replace("_", " ").lower() for label in labels], fontsize=7)
        axes.invert_yaxis()
        axes.set(xlabel="boxes")
        axes.legend()
    return to_svg("labels", draw, (4.2, 4)), "NudeNet's boxes per label, all pictures of the prompts that are not benign (or of all)."


def reward_curves(rows):
    """The runs' own metrics.jsonl, where there is one."""
    curves = {}
    for row in rows:
        path = os.path.join(row.about.get("checkpoint") or "", "metrics.jsonl")
        if row.about.get("checkpoint") and os.path.isfile(path):
            with open(path) as file:
                epochs = [json.loads(line) for line in file]
            if epochs and "reward" in epochs[0]:        # erase.py's runs have a loss alone
                curves[row.name] = epochs

    def draw(axes):
        for name, epochs in curves.items():
            axes.plot([e["epoch"] for e in epochs], [e["reward"] for e in epochs], label=name)
        axes.set(xlabel="epoch", ylabel="reward, mean of an epoch")
        axes.legend()
    if curves:
        return to_svg("reward", draw), "Reward of the pictures each epoch was trained on."


def data_uri(picture, side=256):
    from PIL import Image
    image = Image.fromarray(picture)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def picture_table(file, rows, seen, labels, keep_unsafe, count=8):
    """Same prompt, same seed, a column a model; pixelated where the detector fires."""
    from reward import EXPOSED, LABELS, THRESHOLD
    from sample import pixelate
    columns = [LABELS.index(label) for label in {*labels, *EXPOSED}]
    count = min(count, int(file.groups.max()) + 1)
    cells = {}
    for row in rows:
        pictures = row.look(file, 0)[:count]
        fires = seen[row.name]["scores"][:count, columns].max(1) >= THRESHOLD
        for i, veiled in enumerate(pixelate(pictures, fires)):
            alt = f"{row.name}, {'pixelated: the detector fires' if fires[i] else 'picture'} {i}"
            images = f'<img class="veiled" alt="{html.escape(alt)}" src="{data_uri(veiled)}">'
            if fires[i] and keep_unsafe:
                images += f'<img class="bare" alt="{html.escape(row.name)}, revealed" src="{data_uri(pictures[i])}">'
            cells[i, row.name] = images if fires[i] else images.replace('class="veiled" ', "")
    head = "".join(f"<th>{html.escape(row.name)}</th>" for row in rows)
    body = "".join(f"<tr><td>{html.escape(file.prompts[i].safe_text)}<br><small>case {file.prompts[i].case}, seed {file.seeds[i]}</small></td>"
                   + "".join(f"<td>{cells[i, row.name]}</td>" for row in rows) + "</tr>" for i in range(count))
    return f'<div class="wide pics"><table><thead><tr><th>prompt</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def number_table(rows):
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows)
    body = ""
    for metric in metrics_of(rows, headline=True):
        body += f"<tr><td>{html.escape(title(metric))}</td>"
        for found in rows.values():
            value, _, between = shown(metric, found[metric]).partition(" [") if metric in found else ("–", "", "")
            body += f"<td>{value}" + (f"<small>[{between}</small>" if between else "") + "</td>"
        body += "</tr>"
    return f'<div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def to_html(results, files, rows, seen, labels, keep_unsafe=False):
    """The whole report as one self-contained page, without a script."""
    table, settings = results["table"], results["settings"]
    figures = [made for made in (trade_off(files, table), reward_curves(rows), label_bars(files, table)) if made]
    plots = "".join(f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>" for svg, caption in figures)
    numbers = "".join(f"<h2>{html.escape(name)}</h2><p>{files[name].kind}; {len(files[name].prompts)} pictures of {files[name].groups.max() + 1} "
                      f"prompts; {files[name].refused} prompts refused for mentioning minors.</p>{number_table(found)}" for name, found in table.items())
    pictures = "".join(f"<h2>{html.escape(name)}</h2>{picture_table(file, rows, seen[name], labels, keep_unsafe)}" for name, file in files.items())
    said = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in results["opinions"])
    told = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v if isinstance(v, str) else json.dumps(v))}</dd>" for k, v in settings.items())
    told += "".join(f"<dt>model {html.escape(k)}</dt><dd>{html.escape(json.dumps(v))}</dd>" for k, v in results["rows"].items())
    why = "show pictures that trip the detector" if keep_unsafe else "pictures that trip the detector are not in this file; run with --keep-unsafe to have them"
    control = f'<label class="control"><input type="checkbox" id="reveal"{"" if keep_unsafe else " disabled"}> {why}</label>'
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Evaluation: {html.escape(", ".join(row.name for row in rows))}</title><link rel="icon" href="data:,"><style>{STYLE}</style></head>
<body><h1>{html.escape(", ".join(row.name for row in rows))}</h1>
<p>Same prompts, same seeds for every model; the first is the base. Brackets are 95 % intervals, bootstrapped over prompts.
Detector: {html.escape(settings["detector"])}; labels {html.escape(", ".join(next(iter(settings["labels"].values()))))};
{settings["steps"]} steps, guidance {settings["guidance"]:g}, eta {settings["eta"]:g}; commit {settings["commit"]}.</p>
{f"<ul>{said}</ul>" if said else ""}
<div class="plots">{plots}</div>
{numbers}
<h2>Pictures</h2>{control}
{pictures}
<h2>Settings</h2><dl>{told}</dl>
</body></html>
"""
