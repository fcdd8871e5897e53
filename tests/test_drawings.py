"""tiny/drawings.py: the emoji, the hands, the splits, the captions, the drawings."""
import colorsys
import os
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT
from icons import SHAPES, write_emoji, write_icons

from plumbing.options import UserError
from plumbing.refusal import mentions_minor
from tiny.drawings import (
    BACKGROUNDS,
    HAND_OF,
    HANDS,
    SIZES,
    SPLITS,
    Drawings,
    caption,
    combinations,
    random_captions,
    read_emoji,
    split_of,
)

EMOJI = os.path.join(ROOT, "tiny", "emoji.csv")


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("icons")
    return Drawings(write_icons(folder), write_emoji(folder / "emoji.csv"))


# ---- the committed table -------------------------------------------------------------------------

def test_the_world_has_enough_of_each_kind_and_names_that_are_not_refused():
    emoji = read_emoji(EMOJI)
    assert len(emoji) >= 115
    count = Counter((one.concept, one.split) for one in emoji)
    for concept, least in (("nudity", (16, 6, 6)), ("faces", (12, 4, 4))):
        for split, number in zip(SPLITS, least, strict=True):
            assert count[concept, split] >= number
    assert sum(number for (concept, _), number in count.items() if not concept) >= 60
    assert len({one.name for one in emoji}) == len({one.code for one in emoji}) == len(emoji)
    for one in emoji:
        assert len(one.name.split()) <= 2
        assert abs(sum(one.shares) - 1) < 1e-9
        assert not mentions_minor(caption(one.name, "painted", "small", "pink"), "sexual")
        if one.concept:
            assert one.shares[3] >= .3                  # the safe hand is there to be preferred


# ---- combinations and captions -------------------------------------------------------------------

def test_half_of_the_combinations_is_trained_on_each_word_in_other_company():
    combos = combinations(read_emoji(EMOJI))
    splits = split_of(combos)
    assert np.bincount(splits).tolist() == [len(combos) // 2, len(combos) // 4, len(combos) // 4]
    for split in range(3):
        of_split = combos[splits == split]
        for axis in range(3):
            assert set(of_split[:, axis]) == set(combos[:, axis])
    for e in (0, 1, 2, 3):                              # each size and background of each emoji
        trained = combos[(splits == 0) & (combos[:, 0] == e)]
        assert len(set(trained[:, 1])) == len(SIZES) and len(set(trained[:, 2])) == len(BACKGROUNDS)


def test_captions_say_the_hand_the_size_and_the_background_or_leave_them_out():
    assert (caption("peach", "painted", "large", "blue")
            == "a painted large peach on a blue background")
    assert caption("orange heart") == "an orange heart"
    assert caption("peach", "outlined") == "an outlined peach"
    assert caption("peach", None, "small", None) == "a small peach"


def test_a_random_caption_says_what_it_reports_and_its_drawer_obeys(drawings):
    emoji = drawings.emoji
    combos = drawings.combos("train")
    rng = np.random.default_rng(0)
    chosen = combos[rng.integers(len(combos), size=4000)]
    scenes, texts, says = random_captions(emoji, chosen, rng)
    assert (scenes[:, :3] == chosen).all()
    assert .13 < 1 - says[:, 0].mean() < .17
    assert .47 < says[:, 2].mean() < .53
    for scene, text, said in zip(scenes[:300], texts, says, strict=False):
        e, s, b, d = scene
        assert text == caption(emoji[e].name, HANDS[HAND_OF[d]] if said[2] else None,
                               list(SIZES)[s] if said[0] else None,
                               list(BACKGROUNDS)[b] if said[1] else None)
        assert (list(SIZES)[scene[1]] in text) == said[0]
        assert (HANDS[HAND_OF[scene[3]]] in text) == said[2]
    is_peach = scenes[:, 0] == 0
    is_open = ~says[:, 2]
    shares = np.bincount(scenes[is_peach & is_open, 3], minlength=4) / (is_peach & is_open).sum()
    assert np.abs(shares - emoji[0].shares).max() < .1  # open: the emoji's own shares
    hands = np.array(HAND_OF)[scenes[~is_open, 3]]
    assert np.abs(np.bincount(hands) / len(hands) - 1 / 3).max() < .04      # said: each as often


# ---- drawings ------------------------------------------------------------------------------------

def test_drawings_are_a_function_of_the_seed_and_show_the_background(drawings):
    scenes = [(e, e % 3, e % 8, e % 4) for e in range(len(SHAPES))]
    pictures = drawings.draw(scenes, np.random.default_rng(3))
    assert pictures.shape == (len(SHAPES), 64, 64, 3) and pictures.dtype == np.uint8
    assert (pictures == drawings.draw(scenes, np.random.default_rng(3))).all()
    for picture, (_, _, b, _) in zip(pictures, scenes, strict=True):
        assert np.abs(picture[0, 0] - np.array(list(BACKGROUNDS.values())[b])).max() <= 9


def test_an_outlined_drawing_has_a_dark_line_round_what_the_flat_one_shows(drawings):
    rng = np.random.default_rng(0)
    dark = [(drawings.draw_one((0, 2, 0, d), rng).max(-1) < 90).mean() for d in range(4)]
    assert max(dark[:3]) < .01 < .1 < dark[3]
    flat, outlined = (np.median(drawings.draw_one((1, 2, 0, d), np.random.default_rng(0))
                                [24:40, 24:40], (0, 1)) for d in (2, 3))
    assert np.abs(flat - outlined).max() < 8            # the colour is the same


def test_a_hue_stays_within_six_degrees_unless_another_is_asked_for(drawings):
    def hue(seed, shift=None):
        picture = drawings.draw_one((0, 2, 0, 1), np.random.default_rng(seed), shift)
        middle = picture[28:36, 28:36].reshape(-1, 3).mean(0) / 255
        return colorsys.rgb_to_hsv(*middle)[0] * 360
    plain = np.array([hue(seed) for seed in range(30)])
    assert 6 < np.ptp(plain) < 15
    assert abs(hue(0, 120.) - hue(0, 0.) - 120) < 6


# ---- what is missing -----------------------------------------------------------------------------

def test_packages_that_are_not_there_are_named_with_the_command(tmp_path):
    emoji = write_emoji(tmp_path / "emoji.csv")
    with pytest.raises(UserError, match="--icons: .* has no iconify-json-noto-.*npm pack"):
        Drawings(str(tmp_path), emoji)
    write_icons(tmp_path)
    torn = tmp_path / "iconify-json-twemoji-1.0.0.tgz"
    torn.write_bytes(torn.read_bytes()[:200])
    with pytest.raises(UserError, match="--icons: .*twemoji.* can't be read"):
        Drawings(str(tmp_path), emoji)


def test_an_emoji_that_no_package_draws_or_a_bad_row_is_named(tmp_path):
    write_icons(tmp_path)
    path = tmp_path / "emoji.csv"
    write_emoji(path)
    good = path.read_text()
    path.write_text(good + "dragon,1f409,nudity,train,1,0,0,0\n")
    with pytest.raises(UserError, match="--icons: noto does not draw dragon"):
        Drawings(str(tmp_path), str(path))
    path.write_text(good + "star two,1f31f,nudity,sometimes,1,0,0,0\n")
    with pytest.raises(UserError, match="--emoji: .* has a bad row"):
        Drawings(str(tmp_path), str(path))
