"""Options that would do nothing beside the others: a user who gives one is told so.

One table, looked at by every program when it has parsed its options.
"""
import sys
from argparse import Namespace

from plumbing.options import UserError

# (program, option, when it does nothing, why and what then); o: the program's args and what
# refuse_idle was told beside them
IDLE = [
    ("train", "clip_weight", lambda o: o.reward,
     "--reward replaces CLIP and nudity; leave one of them out"),
    ("train", "benign", lambda o: not o.benign_share,
     "--benign-share is 0; give more, or leave it out"),
    ("train", "benign_weight", lambda o: o.benign_weight and not o.benign_share,
     "without benign prompts nothing is pulled; give --benign-share"),
    ("sample", "concept", lambda o: o.methods == {"plain"},
     "plain guidance steers away from nothing; give --method"),
    ("evaluate", "concept", lambda o: o.methods == {"plain"},
     "plain guidance steers away from nothing; give --method"),
    ("evaluate", "attacks", lambda o: not o.systems,
     "only the rows of --systems are attacked; give that, or --adversarial FILE"),
    ("evaluate", "category", lambda o: not o.prompts and (o.benign or o.adversarial),
     "it selects rows of --prompts, of which none are given"),
    ("erase", "rank", lambda o: o.trainable == "weights",
     "only a LoRA has a rank; give --trainable lora"),
    ("erase", "category", lambda o: o.prompts is None and not o.needs_pictures,
     "it selects rows of --prompts, of which none are given"),
    ("erase", "concept", lambda o: o.prompts is not None or o.needs_pictures,
     "the prompts are what is erased; leave it out"),
]

ALWAYS = [                              # what can't be meant, given or from a recipe
    (("sample", "evaluate"), "guidance", lambda o: o.guidance == 1 and "negative" in o.methods,
     "1 leaves the negative prompt out; give more, or another method"),
]
SAID = [                                # the same, where it is one of several to be compared
    ("train", "clip_range", lambda o: o.updates == 1, "with --updates 1 the ratio is always 1"),
]


def refuse_idle(program, args, given, unused=(), rival="", **facts):
    """args, if no option that was given does nothing. UserError names the first that does nothing.

    given: names in args; unused: those that the chosen edit or attack, `rival`, does not look at;
    facts: what the table wants to know beside args.
    """
    told = Namespace(**{**vars(args), **facts})
    for name in sorted(given & set(unused)):
        raise UserError(f"{spelled(name)}: {rival} does not use it; leave it out")
    for of_program, name, does_nothing, why in IDLE:
        if of_program == program and name in given and does_nothing(told):
            raise UserError(f"{spelled(name)}: it would do nothing: {why}")
    for programs, name, is_meaningless, why in ALWAYS:
        if program in programs and is_meaningless(told):
            raise UserError(f"{spelled(name)}: {why}")
    for of_program, name, does_nothing, why in SAID:
        if of_program == program and name in given and does_nothing(told):
            print(f"{spelled(name)}: it does nothing here: {why}", file=sys.stderr)
    return args


def spelled(name):
    return f"--{name.replace('_', '-')}"
