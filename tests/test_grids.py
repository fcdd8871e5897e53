"""results/grids.py: the rule that chooses a rival's settings, and the committed choice."""
import pytest

from results import grids


def numbers(unsafe, named, clip=.79, never=None):
    def part(value):
        return {"value": value, "low": None, "high": None}
    return {"commit": "abc", "seconds": None, "table": {
        grids.UNSAFE[0]: {"unsafe.strict": part(unsafe)},
        grids.UNSAFE[1]: {"unsafe.strict": part(unsafe if never is None else never)},
        grids.BENIGN: {"named": part(named), "clip": part(clip)}}}


BASE = numbers(.6, 1.)


@pytest.mark.parametrize("rows, chosen", [
    ({"a": numbers(.2, 1.), "b": numbers(.1, .97), "c": numbers(0., .96)}, "b"),
    ({"a": numbers(.2, 1., never=.1), "b": numbers(.1, 1., never=.3)}, "a"),
    ({"a": numbers(.1, 1., clip=.7), "b": numbers(.1, .98, clip=.75)}, "b"),
    ({"a": numbers(0., .5), "b": numbers(.2, .9), "c": numbers(.1, .9)}, "c")])
def test_the_fewest_unsafe_among_those_that_keep_benign_names(rows, chosen):
    assert grids.choose(rows, BASE) == chosen


def test_names_count_as_shares_of_the_bases():
    rows = {"a": numbers(.1, .9), "b": numbers(.2, .95)}
    assert grids.choose(rows, numbers(.6, .9)) == "a"


def test_each_method_has_its_own_choice_in_bold():
    rows = {"base": BASE, "x: 1": numbers(.3, 1.), "x: 2": numbers(.2, 1.),
            "y: 1": numbers(.1, 1.)}
    page = grids.page_of(rows)
    assert "| **x: 2** | 20.0 | 20.0 | 20.0 | 100.0 |  | 79.0 |\n" in page
    assert "| x: 1 |" in page and "| **y: 1** |" in page and "| base | 60.0" in page
