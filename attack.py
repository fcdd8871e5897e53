r"""Break a defence: by prompts made for it, or by fine-tuning.

    python attack.py ring-a-bell                        # black box: words that do not say it
    python attack.py ring-a-bell-embedding              # the same without the search for words
    python attack.py soft-prompt --checkpoint out/shield --output out/soft.csv      # white box
    python evaluate.py --checkpoint out/shield --adversarial out/ring-a-bell.csv
    python attack.py fine-tune --checkpoint out/shield --output out/tuned   # on harmless pictures
    python evaluate.py --checkpoint out/shield+out/tuned

An attack is a file in attacks/ that names its paper. Writes a prompt file that evaluate.py and
sample.py read; where the text states themselves are the attack, they lie beside it in a
.safetensors of the same name. Fine-tuning writes a folder with a LoRA. Prompts that mention minors
are refused before, and never written.
"""
import csv
import io
import os

import rivals
from attacks import ATTACKS
from plumbing.idle import refuse_idle
from plumbing.kinds import at_least, number, positive
from plumbing.names import base_of, choose_settings, parse_checkpoint
from plumbing.options import Parser, UserError, add_options, run
from plumbing.worlds import parse_with_recipe, read_world, recipe_of


def choose_attack(args):
    """For parse_with_recipe: the model's recipe, and what overrides it.

    That is the attack's own settings, and what a checkpoint's own run was drawn with.
    """
    checkpoint = parse_checkpoint(args.checkpoint, rivals.is_method)
    recipe, of_run = choose_settings(args, checkpoint)
    attack = rivals.find(ATTACKS, args.attack, "attack")
    world = read_world(base_of(checkpoint, args.model))
    return recipe, {**rivals.settings_of(attack, recipe_of(args, world), world.recipe), **of_run}


def is_edit(name):
    return isinstance(rivals.find(ATTACKS, name, "attack"), rivals.Edit)


def parse_args(argv=None):
    p = Parser("Break a defence, by prompts or fine-tuning. An attack's settings (attacks/) and "
               "the model's recipe override the defaults in [].")
    g = p.add_argument_group("what is attacked")
    g.add_argument("attack", choices=list(ATTACKS),
                   help="which attack (ATTACKS in attacks/__init__.py)")
    g.add_argument("--model", default=None,
                   help="folder or hub id of the base; the checkpoint's, or tiny")
    g.add_argument("--checkpoint", default="base",
                   help="the defended model, for an attack that looks into it: its weights, "
                        "PART[@WEIGHT]+PART…; a method's name in it is passed over; the base if "
                        "left out")
    add_options(g, "--recipe")
    g.add_argument("--prompts", nargs="+", default=None,
                   help="files or texts; the model's first held-out file that is not benign; for "
                        "fine-tuning a file whose column image names pictures, the model's own")
    g.add_argument("--benign", nargs="+", default=None,
                   help="files or texts: what fine-tuning preserves, as the model draws it; the "
                        "model's own benign training file if left out")
    add_options(g, "--category")
    g.add_argument("--count", type=at_least(1), default=64,
                   help="adversarial prompts, those of --prompts in turn")
    g = p.add_argument_group("the attack")
    g.add_argument("--tokens", type=at_least(1), default=None, help="number of optimised tokens")
    g.add_argument("--pairs", default=None,
                   help="CSV with the columns unsafe and safe: the concept is their difference; "
                        "the model's own if left out")
    g.add_argument("--strength", type=number, default=3.,
                   help="Ring-A-Bell: how much of the concept is added (eta in the paper)")
    g.add_argument("--population", type=at_least(4), default=200,
                   help="candidates per prompt of the genetic search")
    g.add_argument("--generations", type=at_least(1), default=3000,
                   help="generations of the genetic search")
    g.add_argument("--iterations", type=at_least(1), default=2000,
                   help="updates of the soft prompt, or of fine-tuning")
    g.add_argument("--lr", type=positive, help="learning rate of the soft prompt (Adam), or of "
                   "fine-tuning (AdamW)")
    g.add_argument("--rank", type=at_least(1), default=4, help="rank of fine-tuning's LoRA")
    g.add_argument("--lora-targets", choices=["attention", "all"], default="attention",
                   help="the layers of fine-tuning's LoRA")
    g.add_argument("--prior-weight", type=at_least(0, float), default=1.,
                   help="fine-tuning's weight of what is preserved (lambda in DreamBooth); 0: "
                        "nothing is")
    g.add_argument("--pictures", type=at_least(1), default=256,
                   help="pictures of --benign that fine-tuning preserves")
    g.add_argument("--tries", type=at_least(1), default=3,
                   help="pictures of the base per prompt; the one with the highest nudity score "
                        "is the soft prompt's target")
    g = p.add_argument_group("pictures")
    add_options(g, "--steps", "--eta", "--guidance", "--resolution", "--batch-size",
                "--unsafe-labels")
    g = p.add_argument_group("output")
    g.add_argument("--output", default=None,
                   help="the prompt file, or fine-tuning's folder; out/ATTACK.csv or out/ATTACK if "
                        "left out")
    g.add_argument("--save-every", type=at_least(1), default=50,
                   help="updates of fine-tuning between checkpoints")
    add_options(g, "--device", "--dtype", "--seed")
    args = parse_with_recipe(p, argv, choose_attack, show_recipe=False)
    ending = "" if is_edit(args.attack) else ".csv"
    args.output = args.output or os.path.join("out", args.attack + ending)
    return refuse_idle(p, argv, "attack", args, rivals.unused_options(ATTACKS, args.attack),
                       args.attack)


if __name__ == "__main__":
    ARGS = parse_args()

import torch
from safetensors.torch import save

from erase import train
from model import Policy
from plumbing import checkpoints
from plumbing.devices import DTYPES, choose_device
from plumbing.files import check_places, make_folder, write
from plumbing.pairs import read_pairs
from plumbing.refusal import refuse_minors
from plumbing.tables import csv_rows, read_text
from plumbing.weights import check_weights
from prompts import Prompt, cycle_prompts, read, read_all
from reward import parse_labels
from sample import check_texts


def main(args):
    attack = rivals.find(ATTACKS, args.attack, "attack")
    if is_edit(args.attack):
        return fine_tune(args, attack)
    if not args.output.endswith(".csv"):
        raise UserError(f"--output: {args.output} is given; its name must end in .csv")
    checkpoint = parse_checkpoint(args.checkpoint, rivals.is_method)
    refuse_minors(checkpoint.concept, "--checkpoint")
    args.model = base_of(checkpoint, args.model)
    world = read_world(args.model)
    prompts = read_prompts(args, world)
    if "pairs" in attack.uses:
        args.pairs = args.pairs or world.concept_pairs
        if args.pairs is None:
            raise UserError(f"--pairs: none is given, and {args.model} has no world.json that "
                            "names any; give a CSV with the columns unsafe and safe")
        args.pairs = read_pairs(args.pairs)
    parse_labels(args.unsafe_labels)                    # a mistake is better found now
    check_output(args)
    check_weights(args.model, checkpoint.parts)
    device, _, _ = choose_device(args.device, args.dtype)

    policy = Policy(args.model, (), device, torch.float32)
    check_texts(policy, prompts)
    room = policy.text_length - 3                       # start, end, and a word of the prompt's
    if args.tokens and args.tokens > room:
        raise UserError(f"--tokens: {args.tokens} is given; this model's texts leave room for "
                        f"{room}")
    made = attack.run(policy, prompts, args)
    if not made:
        raise UserError(f"--prompts: {' '.join(args.prompts)} gave no adversarial prompt that "
                        "may be written")
    save_prompts(args.output, made)
    print(f"{len(made)} adversarial prompts in {args.output}")


def fine_tune(args, edit):
    """Train a LoRA on top of --checkpoint, which stays as it is, into the folder --output."""
    checkpoint = parse_checkpoint(args.checkpoint, rivals.is_method)
    args.model, args.output_dir = base_of(checkpoint, args.model), args.output
    world = read_world(args.model)
    if args.prompts is None and world.task is None:
        raise UserError(f"--prompts: none is given, and {args.model} has no world.json that names "
                        "a task; give a file whose column image names pictures")
    args.prompts = args.prompts or [world.task]
    prompts, refused = read_all(args.prompts, args.category)
    benign, more = read_benign(args, world)
    refused += more
    if refused:
        print(f"refused {refused} prompts that mention minors")
    device, dtype, _ = choose_device(args.device, args.dtype, learning=True)
    settings = checkpoints.check_folder(args)
    torch.manual_seed(args.seed)
    policy = Policy(args.model, checkpoint.parts, device, DTYPES[dtype], trainable=True)
    check_texts(policy, prompts)
    check_texts(policy, benign, "--benign")
    trained = policy.make_trainable("lora", args.rank, args.lora_targets)
    write(os.path.join(args.output_dir, "args.json"), settings)     # the folder is this run's
    train(edit, policy, trained, args, prompts, benign, [],
          f"fine-tuned on {len(prompts)} pictures on top of {args.checkpoint}.", args.attack)


def read_benign(args, world):
    """(prompts that fine-tuning preserves, how many were refused); args then says of which files.

    UserError where some are wanted and there are none.
    """
    if not args.prior_weight:
        return [], 0
    if args.benign is None:
        args.benign = [entry.benign for entry in world.training_files[:1] if entry.benign]
    if not args.benign:
        raise UserError(f"--prior-weight: {args.prior_weight:g} needs benign prompts, and "
                        f"{world.model} has no world.json that names any; give --benign, or 0")
    return read_all(args.benign, option="--benign")


def check_output(args):
    """UserError where --output can't be written or would replace what no attack wrote."""
    folder, name = os.path.split(args.output)
    make_folder(folder or ".", "--output")
    check_places(folder, [name, f"{name.removesuffix('.csv')}.safetensors"], option="--output")
    if os.path.exists(args.output):
        header, _ = csv_rows(read_text(args.output, "--output"), f"--output: {args.output}")
        if "original" not in header:
            raise UserError(f"--output: {args.output} is there and no attack's; give another name")


def read_prompts(args, world):
    """--count prompts to attack, each with a seed of its own; args then says of which files."""
    if args.prompts is None:
        args.prompts = [held_out_file(world)]
    # the attack adds what no word says
    prompts, refused = read_all(args.prompts, args.category, sexual=True)
    if refused:
        print(f"refused {refused} prompts that mention minors")
    picked, seeds = cycle_prompts(prompts, args.count, 1_000_000 * (1 + args.seed))
    return [Prompt(p, p.safe_text, seed, p.guidance, p.category, p.case, states=p.states)
            for p, seed in zip(picked, seeds, strict=True)]


def held_out_file(world):
    """The model's first held-out file that is not benign throughout."""
    for entry in world.training_files:
        for file in entry.held_out:
            prompts, _ = read(file, option="--model")
            if any(prompt.category != "benign" for prompt in prompts):
                return file
    raise UserError(f"--prompts: none is given, and {world.model} has no world.json that names a "
                    "held-out file; give a file or a text")


def save_prompts(path, made):
    """Write what an attack made, a list of Adversarial, as a prompt file (see prompts.py)."""
    has_states = made[0].states is not None
    columns = ["case_number", "prompt", "original", "safe_text", "category", "seed", "guidance"]
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow([*columns, "states"] if has_states else columns)
    for i, one in enumerate(made):
        p = one.original
        row = [i, one.text, str(p), p.safe_text, p.category, p.seed, p.guidance]
        table.writerow([*row, i] if has_states else row)
    if has_states:
        if not all(one.states.isfinite().all() for one in made):
            raise UserError("--strength, --lr: the text states that were made are not finite; "
                            "give less")
        states = {str(i): one.states.contiguous().cpu() for i, one in enumerate(made)}
        write(os.path.splitext(path)[0] + ".safetensors", save(states), "--output")
    write(path, text.getvalue(), "--output")


if __name__ == "__main__":
    run(main, ARGS)
