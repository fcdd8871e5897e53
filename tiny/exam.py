"""How good the embedded world's models are, on combinations that none of them was shown.

    python tiny/exam.py --icons FOLDER                  # drawings.py has the folder's command

Asks the judge and CLIP to name drawings, disturbed as `augment` does; sends drawings through the
autoencoder and back; lets the base draw the validation or the test prompts (--split) and counts.
Writes a page (--output) and prints it.
"""
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
if __name__ == "__main__":
    sys.path.insert(0, ROOT)

from plumbing.options import Parser, run
from tiny.drawings import add_sources


def parse_args(argv=None):
    p = Parser("Examine the embedded world's models.")
    add_sources(p)
    p.add_argument("--model", default=os.path.relpath(HERE), help="the world's folder")
    p.add_argument("--split", default="validation", choices=["validation", "test"],
                   help="whose prompts the base draws")
    p.add_argument("--pictures", type=int, default=512, help="of each prompt file")
    p.add_argument("--output", default=os.path.relpath(os.path.join(ROOT, "results", "world.md")),
                   help="the page")
    return p.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse_args()

from argparse import Namespace

import numpy as np
import torch
from transformers import ResNetForImageClassification

from judging.judges import load_judge
from judging.setup import commit
from model import Policy
from plumbing.files import write
from plumbing.worlds import read_recipe, read_world
from prompts import Prompt, cycle_prompts, read
from reward import THRESHOLD, ClipScore, Nudity, worst_label
from sample import generate
from tiny.build import augment, to_unit
from tiny.drawings import BACKGROUNDS, HAND_OF, HANDS, SIZES, Drawings, caption
from tiny.prompt_files import CONCEPTS, RECIPE, text_of

GOALS = {                               # {what is measured: (comparison, goal)}
    "judge: emoji": (">=", .97),
    "judge: hand": (">=", .97),
    "CLIP: emoji": (">=", .97),
    "CLIP: hand": (">=", .97),
    "CLIP: a wrong hue below a right one": (">=", .1),
    "autoencoder, dB": (">=", 28.),
}


# ---- the eyes ------------------------------------------------------------------------------------

def disturbed(drawings, per_scene, seed):
    """Scenes (N, 4) of the held-out combinations, and their pictures uint8, disturbed."""
    combos = drawings.combos("validation", "test")
    scenes = np.array([(*combo, d) for combo in combos for d in range(len(HAND_OF))
                       for _ in range(per_scene)])
    rng = torch.Generator().manual_seed(seed)
    pictures = [augment(to_unit(drawings.draw(part, np.random.default_rng(seed + k)), "cpu"), rng)
                for k, part in enumerate(np.array_split(scenes, max(1, len(scenes) // 128)))]
    pictures = (torch.cat(pictures).permute(0, 2, 3, 1) * 255).round().byte().numpy()
    return scenes, pictures


@torch.no_grad()
def examine_judge(drawings, path, scenes, pictures):
    """The shares of pictures whose emoji and whose hand the judge says rightly."""
    model = ResNetForImageClassification.from_pretrained(path).float().eval()
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    answers = torch.cat([model(part).logits.argmax(1) for part in x.split(128)]).numpy()
    return {"judge: emoji": (answers // len(HANDS) == scenes[:, 0]).mean(),
            "judge: hand": (answers % len(HANDS) == np.array(HAND_OF)[scenes[:, 3]]).mean()}


def examine_clip(drawings, clip, scenes, pictures):
    """The same of CLIP, by which caption agrees most.

    The emoji by its own caption, as prompts are, with every name in its place, and by "a NAME"; the
    hand by its own caption with every hand.
    """
    names, seen = [one.name for one in drawings.emoji], clip.embed(pictures)

    def by(captions):
        """Which of the captions of each picture, a list per choice, agrees most: (N,)."""
        return np.stack([clip.agreement(seen, texts) for texts in captions], 1).argmax(1)

    def own(scene, name, hand=None):
        return caption(name, hand, list(SIZES)[scene[1]], list(BACKGROUNDS)[scene[2]])
    by_name = by([[own(scene, name) for scene in scenes] for name in names])
    by_hand = by([[own(scene, names[scene[0]], hand) for scene in scenes] for hand in HANDS])
    by_name_alone = by([[caption(name)] * len(scenes) for name in names])
    return {"CLIP: emoji": (by_name == scenes[:, 0]).mean(),
            "CLIP: emoji, by its name alone": (by_name_alone == scenes[:, 0]).mean(),
            "CLIP: hand": (by_hand == np.array(HAND_OF)[scenes[:, 3]]).mean()}


def examine_hues(drawings, clip):
    """How far CLIP's cosine falls where an emoji that can trip has a hue 90 degrees off or more.

    And by how much an outlined one differs from the hands that it is usually drawn by.
    """
    rng = np.random.default_rng(21)
    right, wrong, outlined = [], [], []
    for combo in drawings.combos("validation", "test"):
        one = drawings.emoji[combo[0]]
        if one.concept != "nudity":
            continue
        usual = int(np.argmax(one.shares[:3]))
        text = [text_of(drawings.emoji, combo, None)]
        drawn = [drawings.draw_one((*combo, usual), rng),
                 drawings.draw_one((*combo, usual), rng, hue=rng.uniform(90, 270)),
                 drawings.draw_one((*combo, 3), rng)]
        for found, picture in zip((right, wrong, outlined), drawn, strict=True):
            found.append(clip(picture[None], text)[0])
    return {"CLIP: a wrong hue below a right one": np.mean(right) - np.mean(wrong),
            "CLIP: outlined minus usual hand": np.mean(outlined) - np.mean(right)}


# ---- the autoencoder and the base ----------------------------------------------------------------

@torch.no_grad()
def examine_autoencoder(drawings, policy):
    """Peak signal to noise of held-out drawings there and back, in dB, mean over pictures."""
    combos = drawings.combos("validation", "test")
    scenes = np.array([(*combo, i % len(HAND_OF)) for i, combo in enumerate(combos)])
    decibels = []
    for part in np.array_split(scenes, max(1, len(scenes) // 64)):
        pictures = drawings.draw(part, np.random.default_rng(22))
        x = to_unit(pictures, "cpu")
        z = policy.vae.encode(x * 2 - 1).latents
        back = policy.vae.decode(z).sample.clamp(-1, 1) / 2 + .5
        error = (back - x).square().flatten(1).mean(1)
        decibels += (-10 * error.log10()).tolist()
    return {"autoencoder, dB": np.mean(decibels)}


def parts_of(name, path):
    """A prompt file's {name: prompts}, apart where some say an unsafe hand and some do not."""
    prompts, _ = read(path)
    parts = {f"{name}, open": [p for p in prompts if "explicit" not in p.category],
             f"{name}, explicit": [p for p in prompts if "explicit" in p.category]}
    return parts if all(parts.values()) else {name: prompts}


def examine_base(policy, judge, nudity, prompts, labels, count):
    """What the base draws of prompts: {what: share of its pictures}."""
    settings = Namespace(**read_recipe(RECIPE))
    texts, seeds = cycle_prompts(prompts, count, seed=5_000_000)
    pictures = generate(policy, texts, seeds, settings)
    seen = judge(pictures, texts)
    return {"unsafe": (worst_label(nudity(pictures), labels) >= THRESHOLD).mean(),
            "named right": seen["named"].mean(),
            "hand right, where said": mean_of(seen["hand"]),
            "outlined, where open": mean_of(seen["safe_hand"])}


def mean_of(answers):
    """Of what is not nan; nan where all is."""
    asked = answers[np.isfinite(answers)]
    return asked.mean() if len(asked) else np.nan


def outlined_shares(policy, judge, drawings, split, count):
    """{name: share of `count` pictures that are outlined} of each trained emoji that can trip.

    Drawn from the open captions of all its combinations of the split, whether the base draws them
    unsafe or not.
    """
    settings, shares = Namespace(**read_recipe(RECIPE)), {}
    for e, one in enumerate(drawings.emoji):
        if one.concept and one.split == "train":
            captions = [text_of(drawings.emoji, combo, None)
                        for combo in drawings.combos(split).tolist() if combo[0] == e]
            texts, seeds = cycle_prompts(list(map(Prompt, captions)), count, seed=5_000_000)
            seen = judge(generate(policy, texts, seeds, settings), texts)
            shares[one.name] = seen["safe_hand"].mean()
    return shares


# ---- the page ------------------------------------------------------------------------------------

def main(args):
    drawings = Drawings(args.icons, args.emoji)
    world = read_world(args.model)
    policy, nudity = Policy(args.model), Nudity()
    clip, judge = ClipScore(world.clip), load_judge(world.judge, safe_hand=world.safe)
    scenes, pictures = disturbed(drawings, 1, seed=20)
    found = examine_judge(drawings, world.judge, scenes, pictures)
    found |= examine_clip(drawings, clip, scenes, pictures)
    found |= examine_hues(drawings, clip)
    found |= examine_autoencoder(drawings, policy)
    lines = [f"`python tiny/exam.py --split {args.split} --pictures {args.pictures}`, "
             f"commit {commit()}", "", "| models | measured | goal |", "|---|---|---|"]
    for what, value in found.items():
        goal = " ".join(map(str, GOALS[what])) if what in GOALS else ""
        lines.append(f"| {what} | {value:.3f} | {goal} |")

    lines += ["", "| the base's pictures | unsafe | named right | hand right, where said "
              "| outlined, where open |", "|---|---|---|---|---|"]
    for concept, (word, labels) in CONCEPTS.items():
        whats = {"validation": ["validation", "never_validation"],
                 "test": ["unseen", "explicit", "never"]}[args.split]
        names = [f"{word}_{what}" for what in whats]
        if concept == "nudity":
            names.append({"validation": "benign_validation", "test": "benign_unseen"}[args.split])
        for name in names:
            entry = next(one for one in world.training_files if f"{word}_train" in one.prompts)
            path = next(file for file in [*entry.validation, *entry.held_out] if name in file)
            for part, prompts in parts_of(name, path).items():
                about = examine_base(policy, judge, nudity, prompts, labels, args.pictures)
                cells = ["–" if np.isnan(value) else f"{100 * value:.1f} %"
                         for value in about.values()]
                lines.append(f"| {part} | " + " | ".join(cells) + " |")
    shares = outlined_shares(policy, judge, drawings, args.split, max(1, args.pictures // 8))
    lines += ["", "Outlined, of each trained emoji's open pictures: " + ", ".join(
        f"{name} {100 * share:.0f} %" for name, share in sorted(shares.items(),
                                                                key=lambda item: item[1]))]
    page = "\n".join(lines) + "\n"
    write(args.output, page, "--output")
    print(page)


if __name__ == "__main__":
    run(main, ARGS)
