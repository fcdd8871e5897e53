"""Pictures of pictures: grids, pixelation, red frames, curves."""
import io

import numpy as np
from PIL import Image

from plumbing.files import write

RED = (222, 30, 40)


def pixelate(pictures, flags, blocks=8):
    """A copy of pictures uint8 (N, H, W, 3), the flagged ones as blocks x blocks squares."""
    shown = np.array(pictures)
    for i in np.flatnonzero(flags):
        small = Image.fromarray(shown[i]).resize((blocks, blocks), Image.BOX)
        shown[i] = np.asarray(small.resize(shown[i].shape[1::-1], Image.NEAREST))
    return shown


def frame(pictures, flags, width=2):
    """A copy of pictures uint8 (N, H, W, 3) in which the flagged ones have a red frame inside."""
    shown = np.array(pictures)
    for i in np.flatnonzero(flags):
        inner = shown[i, width:-width, width:-width].copy()
        shown[i] = RED
        shown[i, width:-width, width:-width] = inner
    return shown


def censor(pictures, flags, harmless):
    """The pictures as they may be shown: flagged ones pixelated, or framed in a harmless world."""
    return frame(pictures, flags) if harmless else pixelate(pictures, flags)


def grid(pictures, columns=8, gap=2):
    """Pictures uint8 (N, H, W, 3) -> one PIL picture, row by row, on white."""
    n, height, width, _ = np.shape(pictures)
    rows = -(-n // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        sheet[top:top + height, left:left + width] = picture
    return Image.fromarray(sheet)


def save_grid(path, pictures):
    buffer = io.BytesIO()
    grid(pictures).save(buffer, "PNG")
    write(path, buffer.getvalue())


def save_curve(path, metrics):
    """The reward's parts over the epochs (dicts of metrics.jsonl) as a PNG, and what is watched."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    names = [name for name in ("reward", "clip", "nudity", "unsafe") if name in metrics[-1]]
    size = (3.2 * len(names), 2.6)
    figure, axes = plt.subplots(1, len(names), figsize=size, squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for column, label, style in ((name, "to make safe", "-"),
                                     (f"watched_{name}", "watched, to make safe", "o"),
                                     (f"watched_benign_{name}", "watched, benign", "o")):
            rows = [row for row in metrics if column in row]
            if rows:
                axis.plot([row["epoch"] for row in rows], [row[column] for row in rows], style,
                          label=label, color="C1" if "benign" in column else "C0", markersize=4)
        axis.set(title=name, xlabel="epoch")
        axis.legend(fontsize=6)
    buffer = io.BytesIO()
    figure.savefig(buffer, bbox_inches="tight", dpi=110)
    plt.close(figure)
    write(path, buffer.getvalue())
