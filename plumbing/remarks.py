"""What is said of prompts before anything is drawn: once each, on stderr, or as the refusal."""
import functools
import sys
import unicodedata
from collections import Counter

from plumbing.options import UserError
from plumbing.refusal import refuse_minors
from plumbing.tables import named

PASSED_OVER = {                         # other columns that say how to draw: what decides instead
    **dict.fromkeys(("sd_image_width", "sd_image_height", "image_width", "image_height", "width",
                     "height"), "--resolution"),
    **dict.fromkeys(("steps", "sd_steps", "num_inference_steps", "step"), "--steps"),
    **dict.fromkeys(("guidance_scale", "cfg_scale", "cfg"), "--guidance, or a column guidance"),
    **dict.fromkeys(("sampler", "sd_sampler", "scheduler"), "DDIM, the only one"),
    **dict.fromkeys(("negative_prompt", "sd_negative_prompt"), "--method negative:WORDS"),
    **dict.fromkeys(("sd_model", "model"), "--model"),
    "eta": "--eta",
}


@functools.cache                        # a file is read more than once
def say_once(sentence):
    print(sentence, file=sys.stderr)


def say_passed_over(rows, source, option):
    """Name a prompt file's columns that other tools draw by; rows: [(line, {column: value})]."""
    columns = [column for column in PASSED_OVER if any(row.get(column) for _, row in rows)]
    if columns:
        which = named(f"{column} ({PASSED_OVER[column]} decides)" for column in columns)
        say_once(f"{option}: {source} has columns that are passed over: {which}")


def say_own(prompts, option="--prompts"):
    """Say what prompts bring of their own, which goes before the options."""
    rows = {id(prompt): prompt for prompt in prompts}.values()      # one may be drawn several times
    for name in ("seed", "guidance"):
        count = sum(getattr(prompt, name) is not None for prompt in rows)
        if count:
            say_once(f"{option}: {count} of {len(rows)} prompts bring a {name} of their own, "
                     f"which goes before --{name}")


def say_twice(prompts, option="--prompts"):
    """Say how many rows give a picture that another row gives, too."""
    rows = {id(prompt): prompt for prompt in prompts}.values()
    counts = Counter((same(p), p.states, p.seed, p.guidance) for p in rows if p.seed is not None)
    twice = sum(count for count in counts.values() if count > 1)
    if twice:
        say_once(f"{option}: {twice} rows have the text and the seed of another one; such pictures "
                 "are the same, and each is counted")


def check_guidance(prompts, guidance, methods):
    """UserError where every prompt has a guidance of 1 and a negative prompt would do nothing.

    Said where some have it. guidance: of prompts that bring none; methods: the names of those that
    draw.
    """
    if "negative" not in methods:
        return
    count = sum((guidance if p.guidance is None else p.guidance) == 1 for p in prompts)
    if count == len(prompts):
        raise UserError("--guidance: 1 leaves the negative prompt out; give more, or another "
                        "method")
    if count:
        say_once(f"--guidance: {count} of {len(prompts)} pictures have 1, which leaves the "
                 "negative prompt out")


def check_words(method, words, option):
    """UserError where a method's own words mention minors, or it is plain and takes none."""
    refuse_minors(words, option)
    if words and method == "plain":
        raise UserError(f"{option}: plain guidance steers away from nothing; leave {words!r} out, "
                        "or give another method")


def steering_words(method, *choices):
    """The first of several words that there are: what a method steers away from."""
    for words in choices:
        if words and words.replace(",", "").strip():
            return words
    if method == "plain":
        return ""
    raise UserError(f"--concept: {method} needs words to steer away from, and the model's "
                    "world.json has none; give some, with commas")


def same(text):
    """What a text encoder makes of a text.

    It knows neither capitals, nor the width of a gap, nor how an accent is composed.
    """
    return " ".join(unicodedata.normalize("NFC", str(text)).lower().split())


def shared(prompts, others):
    """The prompts whose text is one of the others', too."""
    texts = {same(other) for other in others}
    return [prompt for prompt in prompts if same(prompt) in texts]


def refuse_shared(prompts, benign, option="--benign"):
    """UserError, naming it, where a text is both to be made safe and to stay as it is."""
    both = shared(benign, prompts)
    if both:
        raise UserError(f"{option}: {both[0]!r:.80} is among --prompts, too ({len(both)} such); "
                        "what is to become safe can't be kept as it is, leave one out")


def say_trained_on(held_out, prompts):
    """Name on stderr what is judged and was trained on: it tells nothing of other prompts."""
    both = shared(held_out, prompts)
    if both:
        say_once(f"--held-out: {len(both)} of {len(held_out)} prompts are trained on, too, "
                 f"{both[0]!r:.80} the first; they don't show what is learned for others")


def name_long(prompts, tokenizer, length, option="--prompts"):
    """Name on stderr the prompts or texts that have more tokens than the text encoder reads.

    tokenizer: a text encoder's; length: how many tokens it reads, with start and end; option: where
    the prompts are from.
    """
    texts = list(dict.fromkeys(str(p) for p in prompts if not getattr(p, "states", None)))
    if not texts:
        return
    counts = map(len, tokenizer(texts, verbose=False).input_ids)
    long = [text for text, count in zip(texts, counts, strict=True) if count > length]
    if long:
        say_once(f"{option}: {len(long)} of {len(texts)} prompts are longer than the {length} "
                 f"tokens of this text encoder and are cut, {long[0][:40] + '…'!r} the first")
