"""What NudeNet takes the world's drawings for, before anything is trained on them.

    python tiny/scan.py --icons FOLDER                  # drawings.py has the folder's command

Draws every combination of every emoji by every drawer, several times, and counts the drawings on
which a label of the emoji's concept reaches .3. From these rates and the drawers' shares follows,
by arithmetic, how many drawings of each caption are unsafe: on that the choice of the emoji and of
their shares stands. Writes a page with a line per emoji (--output, Markdown) and beside it a table
with a line per caption (CSV).
"""
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
if __name__ == "__main__":
    sys.path.insert(0, ROOT)

from plumbing.kinds import at_least
from plumbing.options import Parser, run
from tiny.drawings import add_sources


def parse_args(argv=None):
    p = Parser("Scan the embedded world's drawings with NudeNet.")
    add_sources(p)
    p.add_argument("--drawings", type=at_least(1), default=4,
                   help="of each combination by each drawer")
    p.add_argument("--output", default=os.path.relpath(os.path.join(ROOT, "results",
                                                                    "world_scan.md")),
                   help="the page; the table of captions has the same name and ends in .csv")
    return p.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse_args()

import csv
import io

import numpy as np
from tqdm import tqdm

from plumbing.files import write
from reward import EXPOSED, STRICT, THRESHOLD, Nudity, worst_label
from tiny.drawings import DRAWERS, HANDS, Drawings, combinations, of_hand
from tiny.prompt_files import CONCEPTS, FACES, OPEN, SAID, UNSAFE, text_of

LABELS_OF = {"strict": STRICT, "exposed": EXPOSED, "faces": FACES}


def scan(drawings, per_scene):
    """How often drawings trip: {labels' name: (emoji, 24 combinations, 4 drawers)}, 0..1."""
    nudity, rng = Nudity(), np.random.default_rng(5)
    combos = combinations(drawings.emoji).reshape(len(drawings.emoji), -1, 3)
    found = {name: [] for name in LABELS_OF}
    for of_emoji in tqdm(combos, desc="scanning", mininterval=10):
        scenes = [(*combo, d) for combo in of_emoji for d in range(len(DRAWERS))
                  for _ in range(per_scene)]
        scores = nudity(drawings.draw(scenes, rng))
        for name, labels in LABELS_OF.items():
            trips = worst_label(scores, labels) >= THRESHOLD
            found[name].append(trips.reshape(len(of_emoji), len(DRAWERS), per_scene).mean(2))
    return {name: np.stack(rates) for name, rates in found.items()}


def expected(rates, shares, hand=None):
    """The share of a caption's drawings that trip, from its drawers' rates (..., 4): (...).

    shares (4,): how often each drawer draws it; of a said hand those of that hand alone.
    """
    if hand:
        shares = of_hand(shares, HANDS.index(hand))
    return (rates * np.array(shares)).sum(-1)


def own_rates(one, rates, e):
    """The rates (24, 4) that count for an emoji: its concept's labels'."""
    return rates["faces" if one.concept == "faces" else "strict"][e]


def captions_table(emoji, rates):
    """CSV: each caption of an emoji that a detector may take for something, with its share."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["caption", "concept", "unsafe drawings"])
    for e, one in enumerate(emoji):
        combos = [tuple(combo) for combo in combinations(emoji).tolist() if combo[0] == e]
        for hand in OPEN + SAID if one.concept else ():
            shares = expected(own_rates(one, rates, e), one.shares, hand)
            table.writerows([text_of(emoji, combo, hand), one.concept, f"{share:.2f}"]
                            for combo, share in zip(combos, shares, strict=True))
    return text.getvalue()


def page_of(emoji, rates, command):
    """The page: a line per emoji, and what is expected of each group."""
    lines = [f"# What the detector sees in the world's drawings\n\n`{command}`\n",
             "Shares of drawings on which a label of the concept reaches .3, by drawer; how often "
             "each draws it where the hand is left open; then, by arithmetic, the captions of 24 "
             "combinations that are unsafe (a third or more of their drawings), and their mean "
             "share.\n"]
    for concept in CONCEPTS:
        lines += [f"## {concept.capitalize()}\n",
                  "| | split | " + " | ".join(DRAWERS) + " | shares | open captions, unsafe "
                  "| explicit |", "|---" * (len(DRAWERS) + 5) + "|"]
        every = {hand: [] for hand in OPEN + SAID}
        for e, one in enumerate(emoji):
            if one.concept != concept:
                continue
            own = own_rates(one, rates, e)
            cells = []
            for hands in (OPEN, SAID):
                unsafe = []
                for hand in hands:
                    shares = expected(own, one.shares, hand)
                    unsafe += [share for share in shares if share >= UNSAFE]
                    every[hand] += [share for share in shares if share >= UNSAFE]
                cells.append(f"{len(unsafe)}: {np.mean(unsafe):.2f}" if unsafe else "0")
            drawn = " | ".join(f"{rate:.2f}" for rate in own.mean(0))
            shares = " ".join(f"{share:.2g}" for share in one.shares)
            lines.append(f"| {one.name} | {one.split} | {drawn} | {shares} | {cells[0]} "
                         f"| {cells[1]} |")
        means = ", ".join(f"{hand or 'open'} {np.mean(shares):.2f} of {len(shares)} captions"
                          for hand, shares in every.items() if shares)
        lines.append(f"\nUnsafe captions and their mean share of unsafe drawings: {means}.\n")
    lines.append("## Harmless\n")
    for name in ("exposed", "faces"):
        of_harmless = {one.name: rates[name][e].mean() for e, one in enumerate(emoji)
                       if not one.concept}
        worst = sorted(of_harmless.items(), key=lambda item: -item[1])[:5]
        lines.append(f"Of {len(of_harmless)} harmless emoji's drawings "
                     f"{100 * np.mean(list(of_harmless.values())):.2f} % trip a label of {name}; "
                     "most: " + ", ".join(f"{who} {100 * rate:.1f} %" for who, rate in worst)
                     + ".\n")
    return "\n".join(lines)


def main(args):
    drawings = Drawings(args.icons, args.emoji)
    rates = scan(drawings, args.drawings)
    command = f"python tiny/scan.py --icons FOLDER --drawings {args.drawings}"
    write(args.output, page_of(drawings.emoji, rates, command), "--output")
    write(os.path.splitext(args.output)[0] + ".csv", captions_table(drawings.emoji, rates),
          "--output")


if __name__ == "__main__":
    run(main, ARGS)
