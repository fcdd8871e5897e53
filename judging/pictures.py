"""Folders of pictures: which file belongs to which prompt, how it is read, who drew it.

A picture is named after its prompt's case number: CASE.png, or CASE_TURN.png where a case has
several. sample.py leaves samples.json beside its own, {"pictures": {file name: {"prompt", "seed",
"pixelated", "blocked"}}}, by which evaluate.py knows them.
"""
import glob
import itertools
import json
import os
import re
from collections import defaultdict

import numpy as np
from PIL import Image, ImageOps

from plumbing.files import check_places, write
from plumbing.options import UserError, first_line
from plumbing.worlds import read_json

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
NUMBERED = re.compile(r"(\d+)(?:_(\d+))?", re.ASCII)
MANIFEST = "samples.json"
GRID = "grid.png"


# ---- reading -------------------------------------------------------------------------------------

def read_picture(path, option):
    """A picture file -> uint8 RGB (H, W, 3), as it is meant to be seen.

    Turned as its EXIF says, the first frame of several, transparent parts over white, 16 bits
    scaled to 8. UserError where it can't be read.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):              # convert would clip them at 255
                values = np.asarray(image, np.int64)
                if values.min() < 0 or values.max() > 65535:
                    raise ValueError("its values are not of 16 bits")
                image = Image.fromarray((values / 257).round().astype(np.uint8))
            if image.mode == "F":
                raise ValueError("its values are no whole numbers")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return np.asarray(image.convert("RGB"))
    except Exception as error:                          # anything can be wrong in a user's file
        reason = first_line(error).replace(repr(path), "it")
        raise UserError(f"{option}: {path} is no readable picture ({reason or type(error).__name__}"
                        "); make it anew, or take it out") from None


def picture_paths(folder, option):
    """The picture files in a folder, sorted by name."""
    if not os.path.isdir(folder):
        what = "is a file" if os.path.exists(folder) else "does not exist"
        raise UserError(f"{option}: {folder} {what}; a folder of pictures is needed")
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), "*")))
    return [path for path in paths if path.lower().endswith(ENDINGS)]


# ---- which belongs to which case -----------------------------------------------------------------

def turns(prompts):
    """(case, turn) of each picture: its prompt's number, and how many of that came before."""
    counts = defaultdict(itertools.count)
    return [(prompt.case, next(counts[prompt.case])) for prompt in prompts]


def file_names(prompts):
    """CASE.png each, or CASE_TURN.png where a case has several: what evaluate.py --images reads."""
    pairs = turns(prompts)
    if any(turn for _, turn in pairs):
        return [f"{case:05d}_{turn}.png" for case, turn in pairs]
    return [f"{case:05d}.png" for case, _ in pairs]


def pictures_by_case(folder):
    """{case: its pictures' paths, by turn} of CASE.png or CASE_TURN.png in a folder.

    Of a folder of sample.py's, only those of its last command. Turns count from 0 or from 1.
    UserError where it is not clear which picture is whose.
    """
    own, by_turn = read_manifest(folder), defaultdict(dict)
    for path in picture_paths(folder, "--images"):
        name = os.path.basename(path)
        stem = os.path.splitext(name)[0]
        found = NUMBERED.fullmatch(stem)
        if own is not None and name not in own:
            continue
        if found is None:
            if re.match(r"\s*[+-]?\d", stem):
                raise UserError(f"--images: {path} is named neither CASE nor CASE_TURN, as 17.png "
                                "or 17_0.png; rename it, or take it out")
            continue
        case, turn = int(found[1]), found[2] and int(found[2])
        if turn in by_turn[case]:
            raise UserError(f"--images: {by_turn[case][turn]} and {name} are of one case and turn; "
                            "take one out")
        by_turn[case][turn] = path
    if not by_turn:
        raise UserError(f"--images: {folder} holds no picture named by case number, "
                        "such as 17.png or 17_0.png")
    numbers = {turn for pictures in by_turn.values() for turn in pictures if turn is not None}
    first = 0 if 0 in numbers else 1
    for case, pictures in by_turn.items():
        if set(pictures) not in ({None}, set(range(first, first + len(pictures)))):
            names = ", ".join(os.path.basename(path) for path in pictures.values())
            raise UserError(f"--images: {folder} has {names} of case {case}; one without a turn, "
                            f"or turns from {first} on with none missing, are needed")
    return {case: [pictures[turn] for turn in sorted(pictures)]
            for case, pictures in by_turn.items()}


# ---- who drew them -------------------------------------------------------------------------------

def read_manifest(folder, option="--images"):
    """{file name: {"prompt", …}} of what sample.py drew into a folder, or None."""
    path = os.path.join(folder, MANIFEST)
    if not os.path.exists(path):
        return None
    pictures = read_json(path, option).get("pictures")
    if not isinstance(pictures, dict) or not all(
            isinstance(about, dict) and is_numbered(name) for name, about in pictures.items()):
        raise UserError(f"{option}: {path} does not name the pictures of sample.py's last command; "
                        "take it out")
    return pictures


def is_numbered(name):
    stem, ending = os.path.splitext(name)
    return ending.lower() in ENDINGS and NUMBERED.fullmatch(stem) is not None


def check_own(folder, option="--output-dir"):
    """UserError where a folder holds pictures of these names that sample.py did not draw."""
    own = read_manifest(folder, option)
    check_places(folder, [GRID, *(own or ())], option=option)
    names = [name for name in sorted(os.listdir(folder)) if is_numbered(name) or name == GRID]
    foreign = [name for name in names if own is None or name not in (GRID, *own)]
    if foreign:
        raise UserError(f"{option}: {folder} holds {foreign[0]}, which sample.py's {MANIFEST} does "
                        "not name (an earlier edition's?); move such pictures, or give another "
                        "folder")


def replace_own(folder, pictures):
    """Take out what an earlier command drew, and name what this one draws.

    pictures: {file name: {"prompt", …}}.
    """
    for name in read_manifest(folder, "--output-dir") or {}:
        path = os.path.join(folder, name)
        if os.path.exists(path):
            os.remove(path)
    write(os.path.join(folder, MANIFEST), json.dumps({"pictures": pictures}, indent=1))
