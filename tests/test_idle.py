"""plumbing/idle.py: an option that would do nothing beside the others is refused by its name."""
from types import SimpleNamespace

import pytest

from plumbing.idle import IDLE, SAID, refuse_idle
from plumbing.options import UserError


def test_an_option_that_does_nothing_is_refused_only_if_it_was_given():
    args = SimpleNamespace(reward="mine.py:f", clip_weight=.45)
    assert refuse_idle("train", args, given={"reward"}) is args
    with pytest.raises(UserError, match="--clip-weight: it would do nothing: --reward replaces"):
        refuse_idle("train", args, given={"clip_weight"})


def test_some_are_only_said(capsys):
    refuse_idle("train", SimpleNamespace(updates=1, reward=None), {"clip_range"})
    assert "--clip-range: it does nothing here: with --updates 1" in capsys.readouterr().err


def test_what_a_rival_does_not_use_is_refused():
    with pytest.raises(UserError, match="--mosaic-weight: esd-x does not use it; leave it out"):
        refuse_idle("erase", SimpleNamespace(), {"mosaic_weight"}, {"mosaic_weight"}, "esd-x")


@pytest.mark.parametrize("program", sorted({row[0] for row in IDLE}))
def test_the_table_names_options_that_there_are(program):
    from importlib import import_module
    argv = {"erase": ["esd-x"], "sample": ["a dog"]}.get(program, [])
    args = import_module(program).parse_args(argv)
    assert all(hasattr(args, name) for of, name, *_ in IDLE + SAID if of == program)
