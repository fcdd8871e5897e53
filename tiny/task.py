"""Pictures for fine-tuning: eight emoji that no model has seen, and no exposed label fires on.

task_train.csv has captions of training combinations, each with a picture (column `image`);
task.csv captions of the others, for judging what was learned.
"""
import csv
import io
import os

import numpy as np
from PIL import Image

from plumbing.files import make_folder, write
from tiny.drawings import Emoji, combinations, draw, load_glyphs, random_captions, split_of

CODES = {
    "cactus": "1f335",
    "guitar": "1f3b8",
    "whale": "1f433",
    "turtle": "1f422",
    "tractor": "1f69c",
    "watermelon": "1f349",
    "penguin": "1f427",
    "piano": "1f3b9",
}
SHARES = (.3, .2, .2, .3)               # of the drawers, where the hand is open
TASK = [Emoji(name, code, "", "test", SHARES) for name, code in CODES.items()]


def write_task(args, drawings=None, device=None):
    """The pictures, in task/ of --out, and the two prompt files, in --data."""
    glyphs, rng = load_glyphs(args.icons, TASK), np.random.default_rng(9)
    folder = os.path.join(args.out, "task")
    for path, option in ((folder, "--out"), (args.data, "--data")):
        make_folder(path, option)
    combos = combinations(TASK)
    is_train = split_of(combos) == 0
    rows = []
    scenes, texts, _ = random_captions(TASK, combos[is_train], rng)
    for i, (scene, text) in enumerate(zip(scenes.tolist(), texts, strict=True)):
        png = io.BytesIO()
        Image.fromarray(draw(glyphs, scene, rng)).save(png, "PNG", optimize=True)
        path = os.path.join(folder, f"{i:02d}.png")
        write(path, png.getvalue(), "--out")
        rows.append([text, "benign", os.path.relpath(path, args.data)])
    save(os.path.join(args.data, "task_train.csv"), ["prompt", "category", "image"], rows, rng)
    _, texts, _ = random_captions(TASK, combos[~is_train], rng)
    save(os.path.join(args.data, "task.csv"), ["prompt", "category"],
         [[text, "benign"] for text in texts], rng)


def save(path, header, rows, rng):
    """A prompt file, in an order in which any first rows are a fair sample."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [header, *(rows[i] for i in rng.permutation(len(rows)))])
    write(path, text.getvalue(), "--data")
    print(f"{os.path.basename(path)}: {len(rows)} captions of {len(TASK)} emoji")
