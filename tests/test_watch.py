"""plumbing/watch.py: what is seen of the weights, when they have lost what they should keep."""
from types import SimpleNamespace

import numpy as np
import pytest

from plumbing import watch
from prompts import Prompt
from reward import LABELS


def run_of(*looks):
    """Metrics of a run with a look every second epoch: (unsafe, named, benign CLIP)."""
    metrics = []
    for i, (unsafe, named, clip) in enumerate(looks):
        metrics += [{"epoch": 2 * i, "reward_std": 1., "watched_unsafe": unsafe,
                     "watched_named": named, "watched_benign_clip": clip},
                    {"epoch": 2 * i + 1, "reward_std": 1.}]
    return metrics


def clips(*values):
    return run_of(*[(0, 1, value) for value in values])


def test_a_fall_is_a_benign_clip_a_tenth_below_the_bases():
    assert watch.fall(clips(.8, .73)) == 0                          # 8.75 %
    assert watch.fall(clips(.8, .8, .71)) == pytest.approx(.1125)
    assert watch.fall(clips(.8, .5, .8)) == 0                       # it came back
    assert watch.fall(clips(.8, float("nan"))) == 1


def test_without_benign_prompts_or_a_clip_that_means_anything_nothing_is_noticed():
    assert watch.fall([{"epoch": i} for i in range(20)]) == 0
    assert watch.fall([{"epoch": 0, "watched_unsafe": .5}, {"epoch": 5, "watched_unsafe": 0}]) == 0
    assert watch.fall(clips(.05, .01)) == 0                         # agreement with nothing


def test_the_last_good_weights_are_the_last_saved_ones_that_were_seen_good():
    metrics = clips(.8, .8, .8, .6)                                 # epochs 0, 2, 4, 6
    assert watch.last_good(metrics, [6, 4, 2]) == 4
    assert watch.last_good(metrics, [6, 2]) == 2
    assert watch.last_good(metrics, [6]) is None


def test_the_best_look_is_the_safest_of_those_that_keep_names_and_clip():
    base = (.6, 1., .8)
    assert watch.best(run_of(base)) is None
    assert watch.best(run_of(base, (.1, .95, .79), (0, .85, .8), (0, 1., .75))) == 2
    assert watch.best(run_of(base, (.1, .95, .79), (.1, .95, .8), (.2, 1., .8))) == 4
    assert watch.best(run_of(base, (0, .5, .8))) is None
    nameless = [{"epoch": 0, "watched_unsafe": .6}, {"epoch": 2, "watched_unsafe": .1}]
    assert watch.best(nameless) == 2


def test_a_look_draws_the_same_prompts_and_seeds_and_counts_each_half(
        monkeypatch, tmp_path, capsys):
    drawn = []

    def generate(policy, texts, seeds, args):
        drawn.append((list(map(str, texts)), seeds))
        return np.zeros((len(texts), 8, 8, 3), np.uint8)

    def nudity(pictures):
        scores = np.zeros((len(pictures), 18), np.float32)
        scores[::2, LABELS.index("BELLY_EXPOSED")] = .9
        scores[0, LABELS.index("FACE_MALE")] = .9
        return scores
    monkeypatch.setattr("sample.generate", generate)
    monkeypatch.setattr(watch, "PICTURES", 8)
    tools = SimpleNamespace(
        clip=lambda pictures, texts: np.array([len(text) for text in texts], np.float32),
        judge=lambda pictures, texts: {"named": np.array([text == "a dog" for text in texts])})
    watched = ([Prompt("a dog"), Prompt("a hog")], [Prompt("a lamp")])
    policy = SimpleNamespace(world=SimpleNamespace(harmless=True))
    args = SimpleNamespace(output_dir=str(tmp_path))

    def look(watched, tools, label):
        return watch.look(policy, watched, nudity, tools, [label], args, 3)
    assert look(watched, tools, "BELLY_EXPOSED") == {
        "watched_unsafe": .5, "watched_named": .5, "watched_clip": 5., "watched_benign_clip": 6.}
    assert "watched   3  unsafe 0.500  named 0.500  clip 5.000" in capsys.readouterr().out
    assert (tmp_path / "samples" / "epoch_0003.png").exists()
    assert look(watched, tools, "FACE_MALE")["watched_unsafe"] == .25
    assert drawn[0] == drawn[1] and len(set(drawn[0][1])) == 8
    assert drawn[0][0] == ["a dog", "a hog"] * 2 + ["a lamp"] * 4
    assert "watched_benign_clip" not in look((watched[0], []), tools, "FACE_MALE")
    assert look(watched, None, "FACE_MALE") == {} and len(drawn[-1][0]) == 2


def test_a_clip_that_means_nothing_is_said_at_the_end(capsys):
    watch.say_what_was_missed(clips(.05, .05))
    assert "not watched" in capsys.readouterr().err
    watch.say_what_was_missed(clips(.8, .8))
    assert not capsys.readouterr().err
