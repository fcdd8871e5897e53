"""Options: one parser for all programs, whose errors are one sentence.

Imports nothing heavy, so that --help answers at once.
"""
import argparse
import difflib
import errno
import os
import re
import sys

from plumbing.kinds import at_least, pixels, seed, share, steps, words


class UserError(Exception):
    """What the user gave can't be used; the text is one sentence that says what is allowed."""

    def __init__(self, sentence, code=2):
        super().__init__(sentence)
        self.code = code                                # of the program's exit


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
        os.environ["MPLBACKEND"] = "Agg"                # a notebook's would fail outside of it
        for stream in (sys.stdout, sys.stderr):         # a prompt may hold what a terminal lacks
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        sys.excepthook = say_what_ended_it              # the imports that follow can fail, too
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=HelpWithDefaults)

    def given(self, argv=None):
        """The names in args of the options that the user gave, a set."""
        words = {word.partition("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
        return {action.dest for action in self._actions if words & set(action.option_strings)}

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's, but that ~ is the home also behind a =, where a shell leaves it."""
        words = sys.argv[1:] if args is None else args
        words = [re.sub(r"^(--[\w-]+=)~(?=/)", rf"\1{os.path.expanduser('~')}", word)
                 for word in words]
        return super().parse_known_args(words, namespace)

    def error(self, message):
        fail(f"{self.prog}: {self.sentence(message)}")

    def sentence(self, message):
        """argparse's message in the form of ours: the option, what was given, what is allowed."""
        message = re.sub(r"^argument ([^:]*): ", lambda m: m[1].split("/")[0] + ": ", message)
        choice = re.match(r"(.*: )invalid choice: (.*) \(choose from (.*)\)$", message)
        if choice:
            option, given, known = choice.groups()
            return f"{option}{given.strip(chr(39))} is unknown; give {known.replace(chr(39), '')}"
        unknown = re.match(r"unrecognized arguments: (-\S+|.*)", message)
        if unknown:
            options = [name for action in self._actions for name in action.option_strings]
            near = difflib.get_close_matches(unknown[1], options, 1, cutoff=.75)
            hint = f"did you mean {near[0]}?" if near else "see --help"
            return f"{unknown[1]} is unknown; {hint}"
        message = message.replace("the following arguments are required: ", "missing: ")
        return re.sub(r"expected .*argument.*", "a value is needed after it", message)


def learned_steps(args):
    """How many of a picture's denoising steps are learned from: the noisiest ones."""
    return max(1, round(args.steps * args.timestep_fraction))


def spelled(name):
    """An option's name in args as the user writes it."""
    return f"--{name.replace('_', '-')}"


def first_line(error):
    """The beginning of what an error says, for a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:200]


def fail(sentence, code=2):
    print(sentence, file=sys.stderr)
    sys.exit(code)


def say_what_ended_it(kind, error, traceback):
    """For sys.excepthook: a sentence where the user can do something about it."""
    sentence, code = explain(error)
    if not sentence:
        sys.__excepthook__(kind, error, traceback)
        return
    fail(f"{os.path.basename(sys.argv[0])}: {sentence}", code)


def explain(error, args=None):
    """(a sentence, the exit code) for an exception that the user can do something about.

    ("", 1) for any other, which is a fault of the program's and keeps its traceback.
    """
    if isinstance(error, UserError):
        return " ".join(str(error).splitlines()), error.code     # a path may hold a line's end
    if isinstance(error, KeyboardInterrupt):
        return "stopped; what was saved so far stays", 130
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name} is not installed; pip install -r requirements.txt", 2
    if is_out_of_memory(error):
        options = [spelled(name) for name in LESS_MEMORY if hasattr(args, name)]
        remedy = f"; less is needed with {', '.join(options)}" if options else ""
        return f"out of memory{remedy}; what was saved so far stays", 1
    if isinstance(error, BrokenPipeError):
        sys.stdout = open(os.devnull, "w", encoding="utf-8")    # python flushes it at the end
        return "nobody reads what it prints any more; what was saved so far stays", 141
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        where = error.filename or "where its output goes"
        return f"the disk is full ({where}); what was saved so far stays", 2
    return "", 1


OUT_OF_MEMORY = ("OutOfMemoryError|[Oo]ut of memory|not enough memory|bad.alloc|"
                 "[Cc]an(no|')t allocate memory|[Ff]ailed to allocate|ALLOC_FAILED|"
                 "could not create a primitive|failed to map segment")
LESS_MEMORY = ("batch_size", "gradient_checkpointing", "resolution", "population", "rank")


def is_out_of_memory(error):
    """Whether an exception, of whatever library, says that memory ran out."""
    text = f"{type(error).__name__}: {error}"
    return isinstance(error, MemoryError) or bool(re.search(OUT_OF_MEMORY, text))


def run(main, args):
    """main(args); what the user can do something about becomes one sentence and an exit code."""
    try:
        main(args)
    except (Exception, KeyboardInterrupt) as error:
        sentence, code = explain(error, args)
        if not sentence:
            raise
        fail(f"{os.path.basename(sys.argv[0])}: {sentence}", code)


# ---- options that several programs have ----------------------------------------------------------

SHARED = {
    "--recipe": {"help": "settings in recipes/, or a .json file; the run's own or the model's if "
                         "left out"},
    "--category": {"help": "only --prompts of this category (I2P: sexual)"},
    "--concept": {"type": words,
                  "help": "what a method steers away from, words with commas; the model's own if "
                          "left out"},
    "--steps": {"type": steps, "help": "denoising steps per picture (DDIM)"},
    "--eta": {"type": share, "default": 1.,
              "help": "noise of DDIM's steps: 0 is deterministic, 1 is DDPM's"},
    "--guidance": {"type": at_least(1, float),
                   "help": "classifier-free guidance scale; 1 is none"},
    "--resolution": {"type": pixels, "help": "pixels a side; the model's own size if left out"},
    "--batch-size": {"type": at_least(1),
                     "help": "pictures drawn at once; changes them by rounding alone"},
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
