"""Options: one parser for all programs, whose errors are one sentence.

Imports nothing heavy, so that --help answers at once.
"""
import argparse
import difflib
import os
import re
import sys

from plumbing.kinds import at_least, pixels, seed, share, steps


class UserError(Exception):
    """What the user gave can't be used; the text is one sentence that says what is allowed."""


# ---- the parser ----------------------------------------------------------------------------------

class HelpWithDefaults(argparse.HelpFormatter):
    """Help in which an option's default is shown, where it has one to show."""

    def _get_help_string(self, action):
        default = action.default
        if default is None or default is False or default in ([], argparse.SUPPRESS):
            return action.help
        if isinstance(default, list):
            default = " ".join(map(str, default))
        return f"{action.help} [{default}]".replace("%", "%%")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations, whose errors are one sentence with exit code 2."""

    def __init__(self, description):
        for library in ("DIFFUSERS", "TRANSFORMERS"):   # they warn of what is no concern here
            os.environ.setdefault(f"{library}_VERBOSITY", "error")
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=HelpWithDefaults)

    def error(self, message):
        fail(f"{self.prog}: {self.sentence(message)}")

    def sentence(self, message):
        """argparse's message in the form of ours: the option, what was given, what is allowed."""
        message = re.sub(r"^argument ([^:]*): ", lambda m: m[1].split("/")[0] + ": ", message)
        choice = re.match(r"(.*: )invalid choice: (.*) \(choose from (.*)\)$", message)
        if choice:
            option, given, known = choice.groups()
            return f"{option}{given.strip(chr(39))} is unknown; give {known.replace(chr(39), '')}"
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            options = [name for action in self._actions for name in action.option_strings]
            near = difflib.get_close_matches(unknown[1], options, 1, cutoff=.75)
            hint = f"did you mean {near[0]}?" if near else "see --help"
            return f"{unknown[1]} is unknown; {hint}"
        message = message.replace("the following arguments are required: ", "missing: ")
        return re.sub(r"expected .*argument.*", "a value is needed after it", message)


def fail(sentence, code=2):
    print(sentence, file=sys.stderr)
    sys.exit(code)


def run(main, args):
    """main(args); a UserError becomes one sentence on stderr and exit code 2."""
    program = os.path.basename(sys.argv[0])
    try:
        main(args)
    except UserError as error:
        fail(f"{program}: {error}")
    except KeyboardInterrupt:
        fail(f"{program}: stopped; what was saved so far stays", 130)


# ---- options that several programs have ----------------------------------------------------------

SHARED = {
    "--recipe": {"help": "settings in recipes/, or a .json file; the run's own or the model's if "
                         "left out"},
    "--category": {"help": "only --prompts of this category (I2P: sexual)"},
    "--concept": {"help": "what a method steers away from, words with commas; the model's "
                          "own if left out"},
    "--steps": {"type": steps, "help": "denoising steps per picture (DDIM)"},
    "--eta": {"type": share, "default": 1.,
              "help": "noise of DDIM's steps: 0 is deterministic, 1 is DDPM's"},
    "--guidance": {"type": at_least(1, float),
                   "help": "classifier-free guidance scale; 1 is none"},
    "--resolution": {"type": pixels, "help": "pixels a side; the model's own size if left out"},
    "--batch-size": {"type": at_least(1), "help": "pictures drawn at once; does not affect them"},
    "--unsafe-labels": {"default": "strict",
                        "help": "what counts as unsafe: strict (five labels), exposed (nine), "
                                "NudeNet's labels, or several with commas"},
    "--device": {"default": "auto", "help": "auto, cpu, cuda or cuda:N"},
    "--dtype": {"default": "auto", "choices": ["auto", "fp32", "bf16"],
                "help": "precision of the network; there is no fp16, which overflows"},
    "--seed": {"type": seed, "default": 0, "help": "random seed: the same seed, the same results"},
}


def add_options(group, *names):
    """Add options that other programs have too."""
    for name in names:
        group.add_argument(name, **SHARED[name])
