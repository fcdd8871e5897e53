"""Kinds of numbers that options take: the text of the command line -> the value.

Another text is an error that says what was given and what is allowed.
"""
import argparse
import math


def number_type(kind, allowed, is_allowed):
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text} is given; {allowed} is needed") from None
        if not math.isfinite(value) or not is_allowed(value):
            raise argparse.ArgumentTypeError(f"{text} is given; {allowed} is needed")
        return value
    return convert


def at_least(least, kind=int):
    """A number of `least` or more."""
    name = "a whole number" if kind is int else "a number"
    return number_type(kind, f"{name} of {least:g} or more", lambda value: value >= least)


positive = number_type(float, "a number above 0", lambda value: value > 0)
number = number_type(float, "a number", lambda value: True)
share = number_type(float, "a share from 0 to 1", lambda value: 0 <= value <= 1)
share_below_1 = number_type(float, "a share from 0 to below 1", lambda value: 0 <= value < 1)
share_above_0 = number_type(float, "a share above 0, up to 1", lambda value: 0 < value <= 1)
steps = number_type(int, "a whole number from 1 to 999", lambda value: 1 <= value <= 999)
seed = number_type(int, "a whole number from 0 to below 2^32",  # PyTorch's generator knows no more
                   lambda value: 0 <= value < 2 ** 32)
pixels = number_type(int, "a positive multiple of 8",
                     lambda value: value > 0 and value % 8 == 0)


def words(text):
    """Words with commas, of which there is one at least."""
    if not text.replace(",", "").strip():
        raise argparse.ArgumentTypeError(f"{text!r} is given; words are needed, with commas")
    return text
