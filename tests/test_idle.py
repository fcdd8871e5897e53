"""plumbing/idle.py: an option that would do nothing beside the others is refused by its name."""
from importlib import import_module

import pytest

import evaluate
import train
from plumbing.idle import IDLE


def test_an_option_that_does_nothing_is_refused_only_if_it_was_given(capsys):
    train.parse_args(["--reward", "mine.py:f"])
    with pytest.raises(SystemExit) as end:
        train.parse_args(["--reward", "mine.py:f", "--clip-weight", "1"])
    assert end.value.code == 2
    assert "--clip-weight: it would do nothing: --reward replaces" in capsys.readouterr().err


@pytest.mark.parametrize("options, is_used", [
    ([], False), (["--method", "negative"], True), (["--method", "negative:peach"], False),
    (["--method", "negative:peach", "negative"], True), (["--method", "plain"], False),
    (["--checkpoint", "base+negative:peach"], False), (["--checkpoint", "base+safree"], True),
    (["--checkpoint", "base+negative:peach", "--method", "safree"], True),
    (["--systems", "s.csv"], True)])
def test_words_are_of_use_where_a_method_has_none_of_its_own(options, is_used, capsys):
    try:
        assert evaluate.parse_args([*options, "--concept", "egg"]).concept and is_used
    except SystemExit:
        assert not is_used and "--concept: it would do nothing" in capsys.readouterr().err


def test_some_are_only_said(capsys):
    assert train.parse_args(["--updates", "1", "--clip-range", ".01"]).clip_range == .01
    assert "--clip-range: it does nothing here: with --updates 1" in capsys.readouterr().err


def test_a_pull_at_the_late_steps_is_idle_where_there_are_none(capsys):
    assert train.parse_args(["--base-weight", ".1"]).base_weight == .1
    with pytest.raises(SystemExit):
        train.parse_args(["--base-weight", ".1", "--timestep-fraction", "1"])
    assert "--base-weight: it would do nothing: all steps are" in capsys.readouterr().err


@pytest.mark.parametrize("program", sorted({name for programs, *_ in IDLE for name in programs}))
def test_the_table_names_options_that_there_are(program):
    argv = {"erase": ["esd-x"], "sample": ["a dog"], "attack": ["fine-tune"]}.get(program, [])
    args = import_module(program).parse_args(argv)
    assert all(hasattr(args, name) for programs, name, *_ in IDLE if program in programs)
