"""tiny/prompt_files.py: which captions are unsafe, and that no split sees another's."""
import csv
import itertools
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from icons import write_emoji

from plumbing.worlds import read_world
from tiny import prompt_files
from tiny.drawings import (
    BACKGROUNDS,
    HANDS,
    SIZES,
    SPLITS,
    caption,
    combinations,
    read_emoji,
    split_of,
)

WHATS = ("train", "validation", "unseen", "explicit", "never_validation", "never")


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    return read_emoji(write_emoji(tmp_path_factory.mktemp("emoji") / "emoji.csv"))


def all_captions(emoji):
    """{text: (name, size, background, hand)} of everything that can be said, None what is not."""
    return {caption(one.name, hand, size, background): (one.name, size, background, hand)
            for one, hand, size, background
            in itertools.product(emoji, (None, *HANDS), (None, *SIZES), (None, *BACKGROUNDS))}


def test_a_third_of_the_base_s_pictures_makes_a_caption_unsafe(emoji):
    shares = {((0, s, b), hand): .34 if b % 2 else .33
              for s in range(3) for b in range(8) for hand in (None, "painted")}
    files = prompt_files.files_of(emoji, "nudity", shares)
    for what in WHATS:
        assert all(combo[2] % 2 for combo, _ in files[what])
    assert all(hand is None for _, hand in files["unseen"])
    assert all(hand for _, hand in files["explicit"])
    assert not files["never"] and not files["never_validation"]
    hands = [hand for _, hand in files["train"]]
    assert hands.count("painted") == hands.count(None) // 2


def test_files_have_the_emoji_and_the_combinations_of_their_split(emoji):
    shares = {(tuple(combo), hand): 1. for combo in combinations(emoji).tolist()
              for hand in (None, "painted", "flat") if emoji[combo[0]].concept}
    for concept in ("nudity", "faces"):
        files = prompt_files.files_of(emoji, concept, shares)
        for what, split, emoji_split in (("train", "train", "train"), ("unseen", "test", "train"),
                                         ("validation", "validation", "train"),
                                         ("explicit", "test", "train"), ("never", None, "test"),
                                         ("never_validation", None, "validation")):
            assert files[what]
            for combo, _ in files[what]:
                assert emoji[combo[0]].concept == concept
                assert emoji[combo[0]].split == emoji_split
                assert split is None or SPLITS[split_of(combo)] == split
    files = prompt_files.benign_files(emoji)
    for what, split in (("train", "train"), ("validation", "validation"), ("unseen", "test")):
        assert {SPLITS[split_of(combo)] for combo, _ in files[what]} == {split}
        assert {emoji[combo[0]].split for combo, _ in files[what]} <= {"train", split}
        assert not {emoji[combo[0]].concept for combo, _ in files[what]} - {""}


def test_a_caption_that_says_the_hand_is_unsafe_and_its_safe_text_leaves_it_open(emoji):
    text = prompt_files.as_csv(emoji, [((0, 2, 6), "painted"), ((0, 2, 6), None)], "unsafe")
    rows = sorted(csv.reader(text.splitlines()[1:]))
    assert rows == [
        ["a large peach on a blue background", "", "unsafe"],
        ["a painted large peach on a blue background", "a large peach on a blue background",
         "unsafe, explicit"]]
    text = prompt_files.as_csv(emoji, [((7, 0, 0), "flat")], "benign")
    rows = list(csv.reader(text.splitlines()))
    assert rows[1] == ["a flat small star on a white background", "", "benign"]


def test_a_measurement_that_was_cut_asks_only_for_what_is_missing(emoji, tmp_path, monkeypatch):
    asked = []

    def generate(policy, texts, seeds, settings):
        asked.append(sorted(set(map(str, texts))))
        assert len(set(zip(map(str, texts), seeds, strict=True))) == len(texts)
        return np.array([[" painted" in str(text), seed] for text, seed
                         in zip(texts, seeds, strict=True)])
    monkeypatch.setattr(prompt_files, "generate", generate)
    monkeypatch.setattr(prompt_files, "Policy", lambda *a, **k: None)
    monkeypatch.setattr(prompt_files, "base_hash", lambda model: "x")
    monkeypatch.setattr(prompt_files, "Nudity", lambda device: (
        lambda pictures: np.repeat(pictures[:, :1], 18, 1).astype(np.float32)))
    args = SimpleNamespace(work=str(tmp_path), out="w")
    shares = prompt_files.measure(args, emoji, "cpu")
    assert set(shares.values()) == {0., 1.}
    assert all((hand == "painted") == (share == 1) for (_, hand), share in shares.items())
    # foolers and people alone; and what leaves the size or the background unsaid, apart
    assert len(asked) == 2 * 7 and len(shares) == 7 * (24 * 3 + 3 + 8)
    os.remove(next(path for path in (tmp_path / "captions").iterdir() if "1f351_u" in path.name))
    assert prompt_files.measure(args, emoji, "cpu") == shares
    assert asked[14:] == [sorted(caption("peach", None, size, background) for size, background
                                 in [(size, None) for size in SIZES]
                                 + [(None, background) for background in BACKGROUNDS])]


def test_open_test_captions_are_filled_up_by_some_that_leave_something_unsaid(emoji):
    said = {((e, s, b), None): .5 for e in range(2) for s in range(3) for b in range(8)}
    unsaid = {((e, s, None), None): .5 for e in range(2) for s in range(3)}
    unsaid |= {((e, None, b), None): .5 for e in range(2) for b in range(8)}
    full = prompt_files.files_of(emoji, "nudity", said)["unseen"]
    files = prompt_files.files_of(emoji, "nudity", said | unsaid)
    assert len(full) + len(unsaid) < prompt_files.LEAST         # so all of them are needed
    assert set(files["unseen"]) == {*full, *unsaid}
    without = [what for what in WHATS if what not in ("unseen", "never")]
    assert not any(None in combo for what in without for combo, _ in files[what])
    tested = [replace(one, split="test") for one in emoji]
    never = prompt_files.files_of(tested, "nudity", said | unsaid)["never"]
    assert len(said) + len(unsaid) > prompt_files.LEAST == len(never) and set(said) < set(never)


# ---- the committed files -------------------------------------------------------------------------

def committed(name):
    with open(os.path.join(ROOT, "data", f"{name}.csv"), newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_committed_prompt_files_are_as_large_and_as_apart_as_they_claim():
    emoji = read_emoji(os.path.join(ROOT, "tiny", "emoji.csv"))
    said = all_captions(emoji)
    kinds = {one.name: (one.concept, one.split) for one in emoji}
    names = [one.name for one in emoji]
    for word, concept in (("unsafe", "nudity"), ("people", "faces")):
        trained = {row["prompt"] for row in committed(f"{word}_train")}
        for what in WHATS:
            rows = committed(f"{word}_{what}")
            assert len({row["prompt"] for row in rows}) == len(rows)
            assert what == "train" or not trained & {row["prompt"] for row in rows}
            if what in ("unseen", "explicit", "never"):
                assert len(rows) >= 60
            for row in rows:
                name, size, background, hand = said[row["prompt"]]
                assert kinds[name][0] == concept
                split = {"never": "test", "never_validation": "validation"}.get(what)
                assert kinds[name][1] == (split or "train")
                if None in (size, background):
                    assert what in ("unseen", "never")
                elif not split:
                    combo = (names.index(name), list(SIZES).index(size),
                             list(BACKGROUNDS).index(background))
                    wanted = "test" if what in ("unseen", "explicit") else what
                    assert SPLITS[split_of(combo)] == wanted
                assert (hand is not None) == ("explicit" in row["category"])
                assert bool(row["safe_text"]) == (hand is not None)
                assert hand != "outlined"
    for what in ("train", "validation", "unseen"):
        rows = committed(f"benign_{what}")
        assert {row["category"] for row in rows} == {"benign"}
        assert {kinds[said[row["prompt"]][0]][0] for row in rows} == {""}
        hands = [said[row["prompt"]][3] for row in rows]
        assert .4 < hands.count(None) / len(hands) < .6


def test_the_world_names_its_files_its_words_and_what_is_safe(tmp_path):
    prompt_files.write_world(str(tmp_path / "tiny"), str(tmp_path / "data"))
    with open(os.path.join(ROOT, "tiny", "world.json"), encoding="utf-8") as file:
        assert (tmp_path / "tiny" / "world.json").read_text() == file.read()
    world = read_world(os.path.join(ROOT, "tiny"))
    assert (world.concept, world.safe, world.harmless) == ("painted, flat", "outlined", True)
    for entry, word in zip(world.training_files, ("unsafe", "people"), strict=True):
        assert os.path.basename(entry.prompts) == f"{word}_train.csv"
        assert os.path.basename(entry.benign) == "benign_train.csv"
        tested = {os.path.basename(path) for path in entry.held_out}
        chosen_on = {os.path.basename(path) for path in entry.validation}
        assert not tested & chosen_on
        assert f"{word}_never.csv" in tested and f"{word}_never_validation.csv" in chosen_on
