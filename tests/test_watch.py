"""plumbing/watch.py: when a run has lost what it should keep, and which weights are from before."""
import pytest

from plumbing.watch import fall, last_good, say_what_was_missed


def run_of(*values):
    return [{"epoch": i + 1, "benign_clip": value} for i, value in enumerate(values)]


def test_a_fall_is_the_last_five_epochs_mean_a_tenth_below_the_first_fives():
    assert fall(run_of(*[.8] * 5, *[.73] * 5)) == 0                 # 8.75 %
    assert fall(run_of(*[.8] * 5, *[.71] * 5)) == pytest.approx(.1125)
    assert fall(run_of(*[.8] * 20)) == 0


def test_a_model_that_is_ruined_at_once_is_noticed_at_the_sixth_epoch():
    ruined = run_of(.8, .8, .3, .3, .3, .3)
    assert fall(ruined[:5]) == 0 and fall(ruined) > .1


def test_without_benign_prompts_or_clip_nothing_is_noticed():
    assert fall([{"epoch": i} for i in range(20)]) == 0
    assert fall(run_of(*[.05] * 5, *[.01] * 5)) == 0                # agreement with nothing


def test_an_epochs_pictures_show_the_weights_of_the_epoch_before():
    metrics = run_of(.8, .8, .8, .8, .8, .8, .7, .6)
    assert last_good(metrics, [8, 7, 6, 5, 4]) == 5
    assert last_good(metrics, [8, 6]) is None


def test_an_epoch_that_has_no_number_is_passed_over_and_said(capsys):
    metrics = run_of(.8, .8, float("nan"), *[.8] * 3, *[.15] * 5)
    assert fall(metrics) > .5
    say_what_was_missed(metrics)
    assert "not every epoch was watched" in capsys.readouterr().err
    say_what_was_missed(run_of(.8, .8))
    assert not capsys.readouterr().err
