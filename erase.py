"""Erase a concept from a text-to-image model's weights: the rivals that edit weights, one loop.

    python erase.py esd-x                               # or another of rivals/: the embedded world
    python erase.py esd-u --model CompVis/stable-diffusion-v1-4 --output-dir out/sd-esd-u
    python evaluate.py --checkpoint out/shield out/esd-x out/esd-u out/sdd out/safegen

An edit is a loss on the network's output, a file in rivals/ that names its paper. Its settings are
the paper's for Stable Diffusion and our own for the embedded world; steps and guidance are the
model's recipe (recipes/NAME.json); options override both. Writes into --output-dir:
args.json, metrics.jsonl, checkpoints/, unet/ (or the LoRA in diffusers' and kohya's formats), what
else the edit trains in checkpoints/extra.safetensors, README.md (a model card). The same command
resumes where it was cut off, to the same result.
"""
import os
import re

import rivals
from plumbing import checkpoints
from plumbing.idle import refuse_idle
from plumbing.kinds import at_least, number, positive, share, share_above_0, share_below_1
from plumbing.options import Parser, UserError, add_options, run
from plumbing.worlds import DEFAULT_MODEL, parse_with_recipe, read_world, recipe_of


def choose_edit(args):
    """For parse_with_recipe: the model's recipe, and the edit's own settings, which override it."""
    world = read_world(args.model)
    edit = rivals.find(rivals.EDITS, args.edit, "edit")
    own = dict(rivals.settings_of(edit, recipe_of(args, world), world.recipe))
    lora_lr = own.pop("lora_lr", None)
    if args.trainable == "lora" and lora_lr:
        own["lr"] = lora_lr
    return world.recipe, own


def parse_args(argv=None):
    p = Parser("Erase a concept from a text-to-image model's weights. An edit's own settings "
               "(rivals/) and the model's recipe override the defaults in [].")
    g = p.add_argument_group("what is trained, on what")
    g.add_argument("edit", choices=list(rivals.EDITS),
                   help="which edit (EDITS in rivals/__init__.py)")
    g.add_argument("--model", default=DEFAULT_MODEL, help="folder or hub id of the base model")
    add_options(g, "--recipe")
    g.add_argument("--prompts", nargs="+", default=None,
                   help="files or texts: what has to be erased; the names in --concept if left "
                        "out, or the model's training file for an edit that needs pictures")
    g.add_argument("--benign", nargs="+", default=None,
                   help="files or texts: what has to stay, for an edit that needs pictures; those "
                        "that belong to --prompts")
    add_options(g, "--category", "--concept")
    g.add_argument("--trainable", default="weights", choices=["weights", "lora"],
                   help="the weights themselves, or a LoRA on their layers")
    g.add_argument("--rank", type=at_least(1), help="rank of the LoRA")
    g = p.add_argument_group("learning")
    g.add_argument("--iterations", type=at_least(1), default=1000, help="updates in all")
    g.add_argument("--lr", type=positive, help="learning rate of AdamW")
    g.add_argument("--warm-up", type=at_least(0), default=0,
                   help="iterations over which the rate rises")
    g.add_argument("--batch-size", type=at_least(1),
                   help="prompts, or triples of pictures, per iteration")
    g.add_argument("--negative-guidance", type=at_least(0, float), default=1.,
                   help="ESD: how far beyond the empty prompt (eta in the paper); 0 stops there")
    g.add_argument("--start-guidance", type=at_least(1, float), default=3.,
                   help="guidance on the way to a noisy picture (ESD, SDD), or to a safe twin "
                        "(DUO)")
    g.add_argument("--ema", type=share_below_1, default=.999,
                   help="decay of the weights' average, which is what is saved (SDD, SafeGen)")
    g.add_argument("--mosaic-weight", type=share, default=.1,
                   help="SafeGen's weight of the mosaics; benign pictures have the rest of 1")
    g.add_argument("--pictures", type=at_least(1), default=256,
                   help="pictures of --prompts that are drawn (SafeGen, DUO), and of --benign "
                        "(SafeGen)")
    g.add_argument("--strength", type=share_above_0, default=.75,
                   help="DUO: how far a picture is noised before its safe twin is drawn from it")
    g.add_argument("--beta", type=positive, default=500.,
                   help="DUO: how sharply pairs are told apart; what suits a latent of D numbers "
                        "scales with D (500 for Stable Diffusion)")
    g.add_argument("--prior-weight", type=at_least(0, float), default=1e4,
                   help="DUO: weight of what keeps the answer to pure noise, in units of --beta")
    g.add_argument("--log-beta", type=number, default=2.5,
                   help="EraseFlow: log of the constant flow")
    g = p.add_argument_group("pictures")
    add_options(g, "--steps", "--eta", "--guidance", "--resolution", "--unsafe-labels")
    g = p.add_argument_group("output")
    g.add_argument("--output-dir", default=None,
                   help="folder of the run, where the same command resumes; out/EDIT if left out")
    g.add_argument("--save-every", type=at_least(1), default=50,
                   help="iterations between checkpoints, each with a row of metrics.jsonl")
    add_options(g, "--device", "--dtype", "--seed")
    args = parse_with_recipe(p, argv, choose_edit, show_recipe=False)
    args.output_dir = args.output_dir or os.path.join("out", args.edit)
    edit = rivals.find(rivals.EDITS, args.edit, "edit")
    return refuse_idle(p, argv, "erase", args, rivals.unused_options(rivals.EDITS, args.edit),
                       args.edit, needs_pictures=bool(edit.prepare))


if __name__ == "__main__":
    ARGS = parse_args()

import numpy as np
import torch
from safetensors.torch import save
from tqdm import tqdm

from model import LORA_TARGETS, Policy
from plumbing.cards import millions, model_card, print_lines, recipe_line
from plumbing.devices import DTYPES, choose_device
from plumbing.files import write
from plumbing.refusal import refuse_minors
from plumbing.remarks import refuse_shared
from prompts import Prompt, read_all, walk
from reward import parse_labels
from rivals.editing import using_weights
from rivals.guiding import concept_words
from sample import check_texts, generate

# ---- prompts and weights -------------------------------------------------------------------------

def read_prompts(args, edit):
    """(what has to be erased, what has to stay, how many were refused); lists of Prompt.

    What is left out is the concept's names, or for an edit that prepares something the model's
    first training file and its benign one; args then says so.
    """
    world = read_world(args.model)
    refuse_minors(args.concept, "--concept")
    if not edit.prepare and args.prompts is None:
        words = concept_words(args.concept or world.concept)
        return [Prompt(word) for word in words], [], 0
    if args.prompts is None:
        if not world.training_files:
            raise UserError(f"--prompts: none is given, and {args.model} has no world.json that "
                            "names a training file; give a file or a text")
        args.prompts = [world.training_files[0].prompts]
    prompts, refused = read_all(args.prompts, args.category)
    if "benign" not in edit.uses:
        return prompts, [], refused
    if args.benign is None:
        entries = [world.training_file(source) for source in args.prompts]
        args.benign = [entry.benign for entry in entries if entry and entry.benign]
    benign, more = read_all(args.benign, option="--benign")
    refuse_shared(prompts, benign)
    return prompts, benign, refused + more


def choose_weights(policy, pattern, args):
    """Make the weights trainable whose names match, or LoRAs on those layers: {name: parameter}."""
    if args.trainable == "lora":
        layers = "|".join(re.escape(layer) for layer in LORA_TARGETS["all"])
        return policy.make_trainable("lora", args.rank, rf"{pattern}.*\.({layers})")
    weights = policy.make_trainable("weights")          # all float32: frozen ones are saved, too
    for name, p in weights.items():
        p.requires_grad_(bool(re.match(pattern, name)))
    return {name: p for name, p in weights.items() if p.requires_grad}


def print_card(args, policy, trained, prompts, benign, refused, machine):
    """What is about to be done. machine: (device, dtype name, reason)."""
    device, dtype, why = machine
    learned = sum(p.numel() for p in trained.values())
    total = sum(p.numel() for p in policy.unet.parameters())
    lines = [
        ("model", f"{args.model}, {policy.prediction_type}; {args.edit} trains {millions(learned)} "
                  f"of {millions(total)} UNet weights ({args.trainable})"),
        ("recipe", recipe_line(args, choose_edit(args)[1])),
        ("device", f"{device}, {dtype}: {why}"),
        ("prompts", f"{len(prompts)} to erase, {len(benign)} benign; "
                    f"{refused} refused for mentioning minors"),
        ("learning", f"{args.iterations} updates of {args.batch_size} at a rate of {args.lr:g}"),
    ]
    print_lines(lines)


# ---- the loop ------------------------------------------------------------------------------------

def main(args):
    edit = rivals.find(rivals.EDITS, args.edit, "edit")
    labels = parse_labels(args.unsafe_labels)
    prompts, benign, refused = read_prompts(args, edit)
    device, dtype, why = choose_device(args.device, args.dtype, learning=True)
    settings = checkpoints.check_folder(args)

    torch.manual_seed(args.seed)
    policy = Policy(args.model, (), device, DTYPES[dtype], trainable=True)
    policy.concept = args.concept or policy.concept
    check_texts(policy, prompts)
    check_texts(policy, benign, "--benign")
    trained = choose_weights(policy, edit.weights, args)
    write(os.path.join(args.output_dir, "args.json"), settings)     # the folder is this run's
    print_card(args, policy, trained, prompts, benign, refused, (device, dtype, why))
    train(edit, policy, trained, args, prompts, benign, labels,
          description=f"with a concept erased by {edit.paper}.", name=args.edit)


def train(edit, policy, trained, args, prompts, benign, labels, description, name):
    """Train a policy's `trained` weights by an edit, and save them with a model card.

    description, name: what the card says was done, and the method's name.
    """
    def draw(texts, seeds):
        return generate(policy, texts, seeds, args)
    schedule = policy.schedule(args.steps, args.eta)
    job = rivals.Job(policy, args, schedule, trained, checkpoints.copy_of(trained), draw=draw)
    extra = {}
    if edit.prepare:                                    # with the base: nothing is learned yet
        extra = edit.prepare(job, prompts, benign, labels) or {}
    for name, tensor in extra.items():
        job.trained[name] = tensor.requires_grad_()
        job.start[name] = tensor.detach().clone()
    if edit.keeps_average:
        job.average = checkpoints.copy_of(job.trained)

    metrics = learn(edit, job, prompts, extra)

    final = job.average or checkpoints.copy_of(job.trained)
    if extra:
        kept = {name: final[name].cpu().contiguous() for name in extra}
        write(os.path.join(args.output_dir, "checkpoints", "extra.safetensors"), save(kept))
    with using_weights(job.trained, final):
        policy.save(args.output_dir, model_card(args, description, name, metrics[-1]))
    print(f"the model is in {args.output_dir}", flush=True)


def learn(edit, job, prompts, extra=()):
    """The loop: an edit's step, its gradient, an update; resumes from the run's checkpoint.

    extra: the trained tensors that are no weights, whose gradient is clipped by itself.
    Returns the run's metrics, a list of {"iteration", "loss" (a mean), "lr"}.
    """
    args, trained, average = job.args, job.trained, job.average or {}
    warm_up = getattr(args, "warm_up", 0)
    weights = [p for name, p in trained.items() if name not in extra]
    optimizer = torch.optim.AdamW(trained.values(), lr=args.lr, weight_decay=0.)
    folder = os.path.join(args.output_dir, "checkpoints")
    done, metrics, losses = 0, [], []
    state = checkpoints.load_checkpoint(folder)
    if state:
        checkpoints.restore(trained, state["weights"])
        checkpoints.restore(average, state["average"])
        optimizer.load_state_dict(state["optimizer"])
        done, metrics = state["epoch"], state["metrics"]
        checkpoints.write_metrics(args.output_dir, metrics)     # forget what came afterwards
        print(f"resuming after iteration {done}", flush=True)

    bar = tqdm(range(done, args.iterations), initial=done, total=args.iterations, desc="training")
    for i in bar:
        rng = np.random.default_rng([args.seed, i])     # rng and rate depend on the iteration's
        lr = args.lr * min(1, (i + 1) / max(1, warm_up))        # number: a resumed run is equal
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = edit.step(job, walk(prompts, args.batch_size, args.seed, i + 1), rng)
        check_finite(loss, "loss", i + 1)
        loss.backward()
        for tensors in (weights, [trained[name] for name in extra]):
            norm = torch.nn.utils.clip_grad_norm_(tensors, edit.max_grad_norm)
            check_finite(norm, "gradient", i + 1)
        optimizer.step()
        optimizer.zero_grad()
        for name, mean in average.items():
            decay = min(args.ema, ramp(i)) if edit.ramps else args.ema
            mean.lerp_(trained[name].detach(), 1 - decay)
        losses.append(loss.item())
        bar.set_postfix(loss=f"{loss.item():.4f}")
        if (i + 1) % args.save_every == 0 or i + 1 == args.iterations:
            metrics.append({"iteration": i + 1, "loss": float(np.mean(losses)), "lr": lr})
            losses = []
            checkpoints.write_metrics(args.output_dir, metrics)
            checkpoints.save_checkpoint(folder, {
                "epoch": i + 1,                         # as in the file's name
                "metrics": metrics,
                "weights": checkpoints.copy_of(trained),
                "average": average,
                "optimizer": optimizer.state_dict(),
            })
    return metrics


def ramp(i):
    """The decay of diffusers' EMAModel at update i (from 0): the first starts the average."""
    return (1 + i) / (10 + i) if i else 0.


def check_finite(value, name, iteration):
    """A loss or gradient that is not a number ends the run before the weights are touched."""
    if not torch.isfinite(value):
        raise UserError(f"iteration {iteration}: the {name} is {value.item()}; the update was "
                        "refused, the last checkpoint stays")


if __name__ == "__main__":
    run(main, ARGS)
