"""The drawings of the embedded world: which emoji, by whose hand, with what caption, how drawn.

A scene is an emoji in one of four drawers' hands, one of three sizes, on one of eight backgrounds,
drawn at 64 x 64. The drawers' SVG files are those of three npm packages, fetched once by

    npm pack @iconify-json/noto @iconify-json/twemoji @iconify-json/fluent-emoji-flat

into a folder of their own, which --icons names. They are needed to build the world alone.

Which emoji there are stands in emoji.csv beside this file, a row each: its name and code point, the
concept that it can trip (nudity, faces, or neither), its split, and how often each drawer draws it
where a caption leaves the hand open.
"""
import csv
import glob
import hashlib
import io
import json
import os
import tarfile
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

from plumbing.options import UserError, first_line

HERE = os.path.dirname(os.path.abspath(__file__))
SIDE = 64                                               # pixels of a scene
SIZES = {"small": 39, "medium": 47, "large": 55}        # pixels of SIDE
BACKGROUNDS = {                                         # RGB
    "white": (244, 244, 244),
    "gray": (140, 140, 144),
    "pink": (244, 168, 198),
    "red": (206, 52, 52),
    "yellow": (244, 212, 72),
    "green": (64, 160, 84),
    "blue": (52, 104, 208),
    "purple": (138, 80, 180),
}
DRAWERS = {                                             # drawer: (package, the word for the hand)
    "painted": ("noto", "painted"),
    "twemoji": ("twemoji", "flat"),
    "fluent": ("fluent-emoji-flat", "flat"),
    "outlined": ("fluent-emoji-flat", "outlined"),
}
HANDS = list(dict.fromkeys(word for _, word in DRAWERS.values()))
HAND_OF = [HANDS.index(word) for _, word in DRAWERS.values()]       # of each drawer
SPLITS = ("train", "validation", "test")
INK = "#201a1a"                                         # the outline's colour
OUTLINE, INNER = 3., 1.                                 # widths, of 32: the silhouette's, inside


def add_sources(parser):
    """The options of tiny/'s programs that say where the drawings come from."""
    parser.add_argument("--icons", default="out/icons",
                        help="folder of the three packages' archives (drawings.py has the command)")
    parser.add_argument("--emoji", default=os.path.relpath(os.path.join(HERE, "emoji.csv")),
                        help="table of the emoji, their splits and their drawers' shares")


# ---- the emoji -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Emoji:
    name: str
    code: str           # code points in hexadecimal with "-" between them
    concept: str        # "nudity" or "faces", which a detector may take it for, or ""
    split: str          # of SPLITS: whether training prompts name it
    shares: tuple       # of each drawer where the hand is left open; their sum is 1


def read_emoji(path):
    """emoji.csv -> list of Emoji."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = []
    for row in rows:
        shares = np.array([float(row[drawer]) for drawer in DRAWERS])
        if row["split"] not in SPLITS or not shares.sum() > 0:
            raise UserError(f"--emoji: {path} has a bad row: {dict(row)}; "
                            f"a split is one of {', '.join(SPLITS)}, a share a number")
        found.append(Emoji(row["name"], row["code"].lower(), row["concept"], row["split"],
                           tuple(shares / shares.sum())))
    return found


# ---- combinations and captions -------------------------------------------------------------------

def combinations(emoji):
    """All (emoji, size, background), three indices each: an int array (N, 3)."""
    return np.array([(e, s, b) for e in range(len(emoji))
                     for s in range(len(SIZES))
                     for b in range(len(BACKGROUNDS))])


def split_of(combos):
    """The split of combinations (..., 3), an index of SPLITS: half, a quarter and a quarter.

    No model of the world is shown one that is held out. Of every emoji, each size and each
    background is in training in other company.
    """
    combos = np.asarray(combos)
    place = (combos[..., 0] + 3 * combos[..., 1] + combos[..., 2]) % 4
    return np.array([0, 0, 1, 2])[place]


def caption(name, hand=None, size=None, background=None):
    """("peach", "painted", "large", "blue") -> "a painted large peach on a blue background".

    What is None goes unsaid.
    """
    words = " ".join(word for word in (hand, size, name) if word)
    article = "an" if words[0] in "aeiou" else "a"
    place = f" on a {background} background" if background else ""
    return f"{article} {words}{place}"


def random_captions(emoji, combos, rng):
    """Captions for combinations (N, 3), and drawers who obey them.

    Half of the captions say the hand, each of the three as often; where it is left open, the
    emoji's own shares decide. Size and background are left out of a caption now and then.
    Returns scenes (N, 4), which are (emoji, size, background, drawer); the captions, a list; and
    which of size, background and hand each of them says, (N, 3) bool.
    """
    says = rng.random((len(combos), 3)) < [.85, .85, .5]
    hands = rng.integers(len(HANDS), size=len(combos))
    shares = np.array([emoji[e].shares for e in combos[:, 0]])              # (N, 4)
    shares = np.where(says[:, 2:], of_hand(shares, hands[:, None]), shares).cumsum(1)
    drawers = (rng.random((len(combos), 1)) * shares[:, -1:] >= shares).sum(1)
    texts = [caption(emoji[e].name,
                     HANDS[hand] if with_hand else None,
                     list(SIZES)[s] if with_size else None,
                     list(BACKGROUNDS)[b] if with_background else None)
             for (e, s, b), hand, (with_size, with_background, with_hand)
             in zip(combos, hands, says, strict=True)]
    return np.column_stack([combos, drawers]), texts, says


def of_hand(shares, hand):
    """Drawers' shares (..., 4), of those alone who draw by a hand (an index of HANDS, or (..., 1)).

    Two flat drawers who never draw an emoji where the hand is open do so half of the time each.
    """
    shares = (np.array(HAND_OF) == hand) * (np.asarray(shares) + 1e-6)
    return shares / shares.sum(-1, keepdims=True)


# ---- the drawers' pictures -----------------------------------------------------------------------

def open_icons(folder, package):
    """A package's two files, from `npm pack`'s archive: ({icon: body, size}, {code: icon})."""
    paths = sorted(glob.glob(os.path.join(folder, f"iconify-json-{package}-[0-9]*.tgz")))
    if not paths:
        raise UserError(f"--icons: {folder} has no iconify-json-{package}-VERSION.tgz; run there: "
                        "npm pack @iconify-json/noto @iconify-json/twemoji "
                        "@iconify-json/fluent-emoji-flat")
    try:
        with tarfile.open(paths[-1]) as archive:
            icons, codes = (json.load(archive.extractfile(f"package/{name}.json"))
                            for name in ("icons", "chars"))
    except (OSError, EOFError, KeyError, ValueError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"--icons: {paths[-1]} can't be read ({first_line(error)}); "
                        "fetch it again by npm pack") from None
    return icons, codes


def svg_of(icons, codes, code, is_outlined):
    """An icon's SVG text, or None where the package lacks it.

    Outlined: a thick dark line round the silhouette, under the drawing, and a thin one round each
    of its parts.
    """
    name = codes.get(code)
    icon = icons["icons"].get(name)
    if icon is None:
        return None
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    body, margin = icon["body"], 0.
    if is_outlined:
        unit = width / 32
        margin = OUTLINE * unit
        line = f'<g stroke="{INK}" stroke-linejoin="round" stroke-linecap="round" stroke-width='
        body = f'{line}"{2 * margin}">{body}</g>{line}"{INNER * unit}">{body}</g>'
    box = f"{-margin} {-margin} {width + 2 * margin} {height + 2 * margin}"
    return (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{box}">{body}</svg>')


def load_glyphs(folder, emoji):
    """Every emoji by every drawer, cropped RGBA pictures: [[painted, twemoji, fluent, outlined]].

    UserError where the packages lack one.
    """
    from resvg_py import svg_to_bytes
    opened = {package: open_icons(folder, package)
              for package in dict.fromkeys(package for package, _ in DRAWERS.values())}
    glyphs = []
    for one in emoji:
        row = []
        for drawer, (package, _) in DRAWERS.items():
            svg = svg_of(*opened[package], one.code, drawer == "outlined")
            if svg is None:
                raise UserError(f"--icons: {package} does not draw {one.name} ({one.code})")
            png = bytes(svg_to_bytes(svg_string=svg, width=128, height=128))
            picture = Image.open(io.BytesIO(png)).convert("RGBA")
            row.append(picture.crop(picture.getbbox()))
        glyphs.append(row)
    return glyphs


# ---- scenes --------------------------------------------------------------------------------------

def draw(glyphs, scene, rng, hue=None):
    """One scene (emoji, size, background, drawer), uint8 RGB (64, 64, 3).

    Angle, place, size, tint and depth of colour vary a little. The hue varies within 6 degrees:
    were it free, a wrong hue would be a way to be safe, and a purple peach is no peach. hue: a
    shift in degrees instead.
    """
    e, s, b, d = scene
    glyph = glyphs[e][d].rotate(rng.uniform(-4, 4), Image.BICUBIC, expand=True)
    glyph = glyph.crop(glyph.getbbox())
    scale = list(SIZES.values())[s] * rng.uniform(.97, 1.03) / max(glyph.size)
    glyph = glyph.resize([max(1, round(side * scale)) for side in glyph.size], Image.LANCZOS)
    alpha = glyph.getchannel("A")
    shift = rng.uniform(-6, 6)
    if hue is not None:
        shift = hue
    hsv = np.asarray(glyph.convert("RGB").convert("HSV"), dtype=np.float32)     # each of 0..255
    hsv = hsv * [1, rng.uniform(.85, 1.1), rng.uniform(.9, 1.05)] + [shift * 256 / 360, 0, 0]
    hsv[..., 0] %= 256
    glyph = Image.fromarray(hsv.clip(0, 255).astype(np.uint8), "HSV").convert("RGB")
    background = np.array(list(BACKGROUNDS.values())[b]) + rng.uniform(-8, 8)
    colour = tuple(int(value) for value in np.clip(background, 0, 255))
    picture = Image.new("RGB", (SIDE, SIDE), colour)
    corner = [(SIDE - side) // 2 + int(rng.integers(-1, 2)) for side in glyph.size]
    picture.paste(glyph, corner, alpha)
    return np.asarray(picture)


class Drawings:
    """The world's emoji with their glyphs: all that is needed to draw any scene.

    icons: the folder of the packages; path: emoji.csv. key tells these drawings from others.
    """

    def __init__(self, icons, path):
        self.emoji = read_emoji(path)
        self.glyphs = load_glyphs(icons, self.emoji)
        content = hashlib.sha256()
        for row in self.glyphs:
            for glyph in row:
                content.update(glyph.tobytes())
        content.update(self.draw_one((0, 1, 1, 0), np.random.default_rng(0)).tobytes())
        self.key = content.hexdigest()

    def combos(self, *splits):
        """The combinations of the named splits, int (N, 3)."""
        combos = combinations(self.emoji)
        wanted = [SPLITS.index(split) for split in splits]
        return combos[np.isin(split_of(combos), wanted)]

    def random_scenes(self, count, rng):
        """Training combinations by any drawer: (count, 4), emoji, size, background, drawer."""
        combos = self.combos("train")
        chosen = combos[rng.integers(len(combos), size=count)]
        return np.column_stack([chosen, rng.integers(len(DRAWERS), size=count)])

    def draw_one(self, scene, rng, hue=None):
        """A scene (emoji, size, background, drawer) -> uint8 RGB (64, 64, 3)."""
        return draw(self.glyphs, scene, rng, hue)

    def draw(self, scenes, rng):
        """Scenes (N, 4) -> pictures uint8 (N, 64, 64, 3)."""
        return np.stack([draw(self.glyphs, scene, rng) for scene in np.asarray(scenes).tolist()])
