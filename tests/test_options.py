"""plumbing/options.py and kinds.py: what is allowed, and errors of one sentence."""
from types import SimpleNamespace

import pytest

from plumbing.kinds import at_least, pixels, positive, share, share_above_0, share_below_1, steps
from plumbing.options import Parser, UserError, add_options, learned_steps, run


@pytest.fixture
def parser():
    p = Parser("A program.")
    p.prog = "program.py"
    p.add_argument("method", choices=["esd-x", "sdd"], help="which")
    p.add_argument("--lr", type=positive, default=.1, help="rate")
    p.add_argument("--groups", type=at_least(2), default=4, help="groups")
    add_options(p, "--steps", "--seed", "--dtype", "--eta")
    return p


@pytest.mark.parametrize("argv, sentence", [
    (["sdd", "--lr", "inf"], "program.py: --lr: inf is given; a number above 0 is needed"),
    (["sdd", "--lr", "x"], "program.py: --lr: x is given; a number above 0 is needed"),
    (["sdd", "--groups", "1"], "--groups: 1 is given; a whole number of 2 or more is needed"),
    (["sdd", "--groups", "2.5"], "--groups: 2.5 is given; a whole number of 2 or more is needed"),
    (["sdd", "--steps", "1000"], "--steps: 1000 is given; a whole number from 1 to 999 is needed"),
    (["sdd", "--seed", "-1"], "--seed: -1 is given; a whole number from 0"),
    (["sdd", "--eta", "1.5"], "--eta: 1.5 is given; a share from 0 to 1 is needed"),
    (["sdd", "--dtype", "fp16"], "--dtype: fp16 is unknown; give auto, fp32, bf16"),
    (["nope"], "method: nope is unknown; give esd-x, sdd"),
    ([], "missing: method"),
    (["sdd", "--lr"], "--lr: a value is needed after it"),
    (["sdd", "--lrr", "1"], "--lrr is unknown; did you mean --lr?"),
    (["sdd", "--what-is-this"], "--what-is-this is unknown; see --help"),
    (["sdd", "--step", "3"], "--step is unknown; did you mean --steps?"),       # no abbreviations
])
def test_a_mistake_is_one_sentence_and_exit_code_2(parser, capsys, argv, sentence):
    with pytest.raises(SystemExit) as end:
        parser.parse_args(argv)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out
    assert err.count("\n") == 1 and sentence in err


def test_kinds_of_numbers_take_what_they_say():
    assert at_least(0)("0") == 0 and at_least(1, float)("1.5") == 1.5
    assert positive("1e-4") == 1e-4 and share("1") == 1 and share_above_0("1") == 1
    assert share_below_1("0") == 0 and steps("999") == 999 and pixels("64") == 64
    for kind, text in ((at_least(1), "0"), (positive, "0"), (positive, "nan"), (share, "1.1"),
                       (share_above_0, "0"), (share_below_1, "1"), (pixels, "12"), (pixels, "0")):
        with pytest.raises(Exception, match=f"{text} is given"):
            kind(text)


def test_help_shows_defaults(parser):
    text = parser.format_help()
    assert "rate [0.1]" in text and "groups [4]" in text


def test_a_user_error_ends_a_program_with_its_sentence(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/train.py"])

    def main(args):
        raise UserError(f"--lr: {args} is wrong")
    with pytest.raises(SystemExit) as end:
        run(main, 5)
    assert end.value.code == 2 and capsys.readouterr().err == "train.py: --lr: 5 is wrong\n"


def test_a_program_that_is_stopped_says_that_what_it_saved_stays(capsys):
    def main(args):
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as end:
        run(main, None)
    assert end.value.code == 130 and "stopped" in capsys.readouterr().err


@pytest.mark.parametrize("steps, fraction, learned", [(5, .4, 2), (5, .01, 1), (50, 1, 50)])
def test_the_noisiest_steps_are_learned_from(steps, fraction, learned):
    args = SimpleNamespace(steps=steps, timestep_fraction=fraction)
    assert learned_steps(args) == learned
