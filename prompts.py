"""Prompts: read a prompt file, draw an epoch's prompts.

A prompt file is .txt (one prompt per line, # for comments), .csv or .jsonl with the columns

    prompt       the text (COCO's `caption` is read too)
    safe_text    the text without its unsafe words, for CLIP; the prompt itself if left out
    seed         (or evaluation_seed, sd_seed) the picture's seed
    guidance     (or evaluation_guidance, sd_guidance_scale) the guidance scale
    category     (or categories, with commas) what --category selects
    case_number  the picture's name elsewhere; the row's place, from 0, if left out
    original     the prompt before an attack changed it, in an adversarial file
    states       a name in FILE.safetensors, beside FILE.csv, of the text states (L, D) that stand
                 for the prompt's own
    image        a picture of it, a path beside the file, for what learns from pictures

so that I2P's and COCO's files can be used as they are. Prompts that mention minors never get past
this file (plumbing/refusal.py), in any program; there is no option for that.
"""
import hashlib
import os
import re

import numpy as np
from safetensors import SafetensorError, safe_open

from plumbing.options import UserError, first_line
from plumbing.refusal import mentions_minor
from plumbing.remarks import say_once, say_passed_over
from plumbing.tables import (
    csv_rows,
    guidance_scale,
    jsonl_rows,
    named,
    read_text,
    txt_rows,
    unbroken,
    whole_number,
)

COLUMNS = {
    "prompt": ("prompt", "caption"),
    "safe_text": ("safe_text",),
    "seed": ("seed", "evaluation_seed", "sd_seed"),
    "guidance": ("guidance", "evaluation_guidance", "sd_guidance_scale"),
    "category": ("category", "categories"),
    "case": ("case_number",),
    "original": ("original",),
    "states": ("states",),
    "image": ("image",),
}
ENDINGS = (".txt", ".csv", ".jsonl")


class Prompt(str):
    """A prompt is its text, with what else its row gave.

    safe_text: what CLIP is asked about (the text itself unless given); seed and guidance: None
    unless given; case: its number; original: the text before an attack, or ""; states: None, or
    (safetensors file, name in it, SHA-256 of the file); image: a picture's path, or None.
    """

    def __new__(cls, text, safe_text="", seed=None, guidance=None, category="", case=None,
                original="", states=None, image=None):
        self = super().__new__(cls, text)
        self.safe_text = safe_text or str(text)
        self.seed = seed
        self.guidance = guidance
        self.category = category
        self.case = case
        self.original = original
        self.states = states
        self.image = image
        return self

    @property
    def key(self):
        """What tells it from other prompts: its text, and its text states' name if it has some."""
        return f"{self} [{self.states[1]}]" if self.states else str(self)


# ---- reading -------------------------------------------------------------------------------------

def read(source, category=None, limit=None, option="--prompts", sexual=False):
    """Prompts of a file or a literal text, and how many were refused: (list of Prompt, int).

    option: the name that errors use. category: keep only the rows of that category. sexual: the
    prompts are, though no word may say so (an attack's), which decides what words are refused.
    limit: only the first rows. A row without a prompt is left out and named on stderr, as are
    columns that other tools draw by. Raises UserError, with the line's number where one is bad.
    """
    if str(source).lower().endswith(ENDINGS):
        rows = read_rows(source, option)
    else:
        rows = [(1, {"prompt": as_text(source, option)})]
    states_file = None
    if any(row.get("states") not in (None, "") for _, row in rows):
        states_file = open_states(os.path.splitext(str(source))[0] + ".safetensors", source, option)
    say_passed_over(rows, source, option)
    found = []
    for place, (line, row) in enumerate(rows):
        prompt = parse(row, place, f"{option}: {source}, line {line}", states_file,
                       os.path.dirname(str(source)))
        if prompt:
            found.append(prompt)
        else:                                           # I2P has one
            say_once(f"{option}: {source}, line {line} is left out, its prompt is empty")
    if category:
        found = of_category(found, category, source)
    kept = []
    for p in found:
        everything = f"{p} | {p.safe_text} | {p.original}"
        if not mentions_minor(everything, p.category + (" sexual" if sexual else "")):
            kept.append(p)
    if not kept:
        raise UserError(f"{option}: {source} has no usable prompt ({len(found)} refused)")
    return kept[:limit], len(found) - len(kept)


def read_all(sources, category=None, option="--prompts", optional_category=False, sexual=False):
    """The prompts of several files or texts, one after the other: (list of Prompt, refused).

    optional_category: a file in which no row has the category is used whole; sexual: as in read.
    """
    prompts, refused = [], 0
    for source in sources:
        wanted = category_in(source, category, option) if optional_category else category
        more, dropped = read(source, wanted, option=option, sexual=sexual)
        taken = {prompt.case for prompt in prompts}
        if taken & {prompt.case for prompt in more}:    # pictures are named by their case
            for prompt in more:
                prompt.case += max(taken) + 1
        prompts += more
        refused += dropped
    return prompts, refused


def as_text(source, option):
    """A literal text, which must not look like a file's name."""
    if os.path.exists(source):
        raise UserError(f"{option}: {source} is no prompt file; "
                        "its name must end in .txt, .csv or .jsonl")
    if not source.strip():
        raise UserError(f"{option}: the text is empty; "
                        "give a sentence or a .txt, .csv or .jsonl file")
    if re.fullmatch(r"\S*/\S*|\S+\.\w{1,5}", source.strip()):
        raise UserError(f"{option}: {source} is neither a file nor a sentence; "
                        "a prompt file ends in .txt, .csv or .jsonl")
    return source


def read_rows(path, option):
    """A prompt file -> [(line number, {column: value})]."""
    text, where = read_text(path, option), f"{option}: {path}"
    needed = set(COLUMNS["prompt"])
    ending = os.path.splitext(path)[1].lower()
    if ending == ".txt":
        return txt_rows(text, where)
    if ending == ".csv":
        header, rows = csv_rows(text, where)
        if not needed & set(header):
            raise UserError(f"{where} has no column 'prompt'; its columns are {named(header)}; "
                            "commas stand between them")
        return rows
    rows = jsonl_rows(text, where)
    for line, row in rows:
        if not needed & set(row):
            raise UserError(f"{where}, line {line} has no 'prompt'; its keys are {named(row)}")
    return rows


def open_states(path, source, option):
    """(path, SHA-256 of the file, the names in it) of the text states beside a prompt file."""
    try:
        with open(path, "rb") as file:
            content = file.read()
        with safe_open(path, "np") as file:
            return path, hashlib.sha256(content).hexdigest(), set(file.keys())
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{option}: {source} has text states, but {path} can't be read "
                        f"({reason})") from None


def categories_of(prompt):
    return [c.strip().lower() for c in prompt.category.split(",") if c.strip()]


def of_category(prompts, category, source):
    """The prompts of a category; UserError, naming those that there are, if there is none."""
    wanted = category.strip().lower()
    found = [p for p in prompts if wanted in categories_of(p)]
    if not found:
        known = sorted({c for p in prompts for c in categories_of(p)})
        which = f"known are {named(known)}" if known else "it has none; leave --category or it out"
        raise UserError(f"--category: no prompt of {source} is of category {category!r}; {which}")
    return found


def category_in(source, category, option):
    """The category where a file has it, else None: a file without it is used whole."""
    wanted = (category or "").strip().lower()
    has_it = any(wanted in categories_of(p) for p in read(source, option=option)[0])
    return category if has_it else None


def parse(row, place, where, states_file=None, folder=""):
    """A row of a file (dict of texts or JSON values) -> Prompt.

    place: the row's number, from 0; where: how errors name it; states_file: open_states' answer;
    folder: the file's.
    """
    def text(name):
        for column in COLUMNS[name]:
            value = row.get(column)
            if isinstance(value, (list, dict, bool)):
                raise UserError(f"{where}: {column} is {value!r:.40}, not a text or a number")
            if value not in (None, ""):
                return unbroken(str(value).strip(), f"{where}: {column}")
        return ""

    def number(name, convert, allowed):
        given = text(name)
        try:
            return convert(given) if given else None
        except ValueError:
            raise UserError(f"{where}: {name} is {given!r:.40}; {allowed} is needed") from None

    whole = "a whole number from 0 to below 2^63"
    seed, case = number("seed", whole_number, whole), number("case", whole_number, whole)
    guidance = number("guidance", guidance_scale, "1 (none) or more")
    states = None
    if text("states"):
        path, sha256, names = states_file
        states = path, text("states"), sha256
        if text("states") not in names:
            raise UserError(f"{where}: {path} has no text states {text('states')!r:.40}")
    image = os.path.join(folder, text("image")) if text("image") else None
    if image and not os.path.isfile(image):
        raise UserError(f"{where}: image {image} is no file; paths are relative to the prompt file")
    return Prompt(text("prompt"), text("safe_text"), seed, guidance, text("category"),
                  place if case is None else case, text("original"), states, image)


# ---- drawing -------------------------------------------------------------------------------------

def benign_groups(benign, groups, benign_share):
    """How many of an epoch's groups of pictures are of benign prompts; 0 where there are none."""
    return round(groups * benign_share) if benign else 0


def check_epoch(args, data, processes):
    """Refuse what no epoch can be drawn of: options that don't go into each other or the prompts.

    processes: how many share an epoch's pictures.
    """
    pictures = args.groups * args.group_size
    if pictures % (args.updates * processes):
        raise UserError(f"--updates: the {pictures} pictures of an epoch (--groups {args.groups} x "
                        f"--group-size {args.group_size}) are not divisible by {args.updates} "
                        f"updates x {processes} processes")
    benign = benign_groups(data.benign, args.groups, args.benign_share)
    if data.benign and args.benign_share and not benign:
        raise UserError(f"--benign-share: {args.benign_share:g} of {args.groups} prompts is none; "
                        "give more, or 0")
    if benign == args.groups:
        raise UserError(f"--benign-share: {args.benign_share:g} of {args.groups} prompts leaves "
                        "none to make safe; give less")
    if args.group_size == 1 and args.advantage != "memory":
        raise UserError("--group-size: 1 leaves nothing to compare a picture with; "
                        "give more, or --advantage memory")


def draw(prompts, benign, groups, group_size, benign_share, seed, epoch, last_rewards=None,
         hardness=0.):
    """The prompts of an epoch's (1, 2, ...) pictures (N,), and which are benign, (N,) bool.

    First prompts to make safe, group_size times each, to be compared; then, for about benign_share
    of the `groups`, benign ones, which nothing is compared with: once each, so that many are seen.
    Each list is walked in a random order, over the epochs: no prompt comes anew before all came.
    From then on, where hardness is above 0, those to make safe are drawn, without putting back,
    with chances exp(-hardness z), z the mean reward of a prompt's last pictures (last_rewards:
    {Prompt.key: mean}) in standard deviations above that of all prompts: what is still unsafe comes
    more often.
    """
    benign_count = benign_groups(benign, groups, benign_share)
    count = groups - benign_count
    keys = [getattr(prompt, "key", prompt) for prompt in prompts]
    if hardness and all(key in last_rewards for key in keys):
        rewards = np.array([last_rewards[key] for key in keys])
        z = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        rng = np.random.default_rng([seed, epoch, len(prompts)])
        noise = rng.gumbel(size=len(prompts))           # the largest of log-chance + Gumbel noise
        order = np.argsort(hardness * z - noise)        # are such a draw
        drawn = [prompts[i] for i in np.resize(order, count)]
    else:
        drawn = walk(prompts, count, seed, epoch)
    compared = [prompt for prompt in drawn for _ in range(group_size)]
    texts = np.array(compared + walk(benign, benign_count * group_size, seed, epoch), dtype=object)
    return texts, np.arange(len(texts)) >= len(compared)


def walk(prompts, count, seed, epoch):
    """An epoch's next `count` of a list that is walked in a new random order each time through."""
    orders, drawn = {}, []                              # an order is a function of seed and number
    for position in range((epoch - 1) * count, epoch * count):
        number, place = divmod(position, len(prompts))
        if number not in orders:
            orders[number] = np.random.default_rng([seed, number]).permutation(len(prompts))
        drawn.append(prompts[orders[number][place]])
    return drawn


def cycle_prompts(prompts, count, seed):
    """`count` (prompt, seed) pairs: the prompts in turn, a prompt's own seed the first time."""
    picked = [prompts[i % len(prompts)] for i in range(count)]
    seeds = []
    for i, prompt in enumerate(picked):
        own = prompt.seed if i < len(prompts) else None
        seeds.append(seed + i if own is None else own)
    return picked, seeds
