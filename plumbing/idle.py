"""Options that would do nothing beside the others: a user who gives one is told so.

One table, looked at by every program when it has parsed its options.
"""
import sys
from argparse import Namespace

from plumbing.options import learned_steps, spelled

REFUSED, SAID = "refused", "said"       # the latter where it is one of several to be compared
DRAWS = ("sample", "evaluate")
# (programs, option, when it does nothing, why and what then, what is done); o: the program's args
# and the facts that refuse_idle was told beside them
IDLE = [
    (("train",), "clip_weight", lambda o: o.reward,
     "--reward replaces CLIP and nudity; leave one of them out", REFUSED),
    (("train",), "benign", lambda o: not o.benign_share,
     "--benign-share is 0; give more, or leave it out", REFUSED),
    (("train",), "benign_weight", lambda o: o.benign_weight and not o.benign_share,
     "without benign prompts nothing is pulled; give --benign-share", REFUSED),
    (("train",), "base_weight", lambda o: o.base_weight and learned_steps(o) == o.steps,
     "all steps are learned from; give a --timestep-fraction below 1", REFUSED),
    (("train",), "decision", lambda o: o.loss == "elbo",
     "--loss elbo begins its steps anew from the finished pictures", SAID),
    (("train",), "clip_range", lambda o: o.updates == 1,
     "with --updates 1 the ratio is always 1", SAID),
    (DRAWS, "concept", lambda o: all(name == "plain" or words for name, words in o.methods),
     "plain guidance steers away from nothing, another method goes by words of its own; give "
     "--method NAME", REFUSED),
    (("evaluate",), "attacks", lambda o: not o.systems,
     "only the rows of --systems are attacked; give that, or --adversarial FILE", REFUSED),
    (("evaluate",), "results", lambda o: not o.systems,
     "only --systems has a table that is kept; its place is --output-dir", REFUSED),
    (("evaluate",), "split", lambda o: o.prompts or o.benign or o.adversarial,
     "it chooses among the model's own files, and others are given", REFUSED),
    (("evaluate",), "category", lambda o: not o.prompts and (o.benign or o.adversarial),
     "it selects rows of --prompts, of which none are given", REFUSED),
    (("attack",), "benign", lambda o: not o.prior_weight,
     "--prior-weight is 0, so that nothing is preserved; give more, or leave it out", REFUSED),
    (("attack",), "pictures", lambda o: not o.prior_weight,
     "--prior-weight is 0, so that nothing is preserved; give more, or leave it out", REFUSED),
    (("erase",), "rank", lambda o: o.trainable == "weights",
     "only a LoRA has a rank; give --trainable lora", REFUSED),
    (("erase",), "category", lambda o: o.prompts is None and not o.needs_pictures,
     "it selects rows of --prompts, of which none are given", REFUSED),
    (("erase",), "concept", lambda o: o.prompts is not None or o.needs_pictures,
     "the prompts are what is erased; leave it out", REFUSED),
]


def refuse_idle(parser, argv, program, args, unused=(), rival="", **facts):
    """args, if no option that was given does nothing; else the parser's error, which names it.

    unused: options, named as in args, that the chosen edit or attack, `rival`, does not look at;
    facts: what the table wants to know beside args.
    """
    given, told = parser.given(argv), Namespace(**{**vars(args), **facts})
    for name in sorted(given & set(unused)):
        parser.error(f"{spelled(name)}: {rival} does not use it; leave it out")
    for programs, name, does_nothing, why, what in IDLE:
        if program in programs and name in given and does_nothing(told):
            if what == REFUSED:
                parser.error(f"{spelled(name)}: it would do nothing: {why}")
            print(f"{spelled(name)}: it does nothing here: {why}", file=sys.stderr)
    return args
