"""Prompts to pictures: one seed per picture, the same picture in any batch.

    python sample.py "a large peach on a blue background"                   # the base model
    python sample.py --prompts data/unsafe_unseen.csv --checkpoint out/shield --images 32
    python sample.py "a castle" --model CompVis/stable-diffusion-v1-4 --method sld-medium
    torchrun --nproc-per-node 2 sample.py --prompts i2p.csv             # drawn by two processes

Writes one PNG per picture, grid.png, and samples.json into --output-dir, in place of what an
earlier command drew there. Pictures that trip NudeNet are pixelated; of a model whose world.json
says that it is harmless they are framed in red, in grid.png alone. --no-censor shows everything as
it is.
Steps, guidance and the like are those of the checkpoint's own run, else the model's recipe.
"""
import io
import os
from dataclasses import dataclass

import rivals
from plumbing.idle import refuse_idle
from plumbing.kinds import at_least
from plumbing.names import base_of, choose_settings, parse_checkpoint
from plumbing.options import Parser, UserError, add_options, run
from plumbing.worlds import parse_with_recipe


def parse_args(argv=None):
    p = Parser("Prompts to pictures, with or without a fine-tuned checkpoint.")
    p.add_argument("texts", nargs="*", metavar="prompts",
                   help="prompt files (.txt, .csv, .jsonl) or literal texts")
    p.add_argument("--prompts", nargs="+", action="extend", default=[],
                   help="the same, as in the other programs")
    p.add_argument("--model", default=None, help="folder or hub id; the checkpoint's base, or tiny")
    p.add_argument("--checkpoint", default="base",
                   help="out/NAME or a LoRA file, as PART[@WEIGHT]+PART+METHOD; the base if absent")
    p.add_argument("--method", "--guide", default=None,
                   help="how pictures are drawn, some with settings, dual-latent(weight=.3): "
                        + ", ".join(rivals.methods()))
    p.add_argument("--images", type=at_least(1), default=None,
                   help="pictures in all, the prompts in turn; one each if left out")
    p.add_argument("--output-dir", default="out/samples", help="folder of the PNGs")
    p.add_argument("--no-censor", action="store_true",
                   help="show pictures that trip the detector as they are")
    add_options(p, "--recipe", "--category", "--concept", "--steps", "--eta", "--guidance",
                "--resolution", "--batch-size", "--unsafe-labels", "--device", "--dtype", "--seed")
    args = parse_with_recipe(p, argv, lambda args: choose_settings(
        args, parse_checkpoint(args.checkpoint, rivals.is_method)))
    checkpoint = parse_checkpoint(args.checkpoint, rivals.is_method)
    method = args.method or checkpoint.method or "plain"
    return refuse_idle(p, argv, "sample", args, methods={(method, checkpoint.concept)})


if __name__ == "__main__":
    ARGS = parse_args()

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ddpo import denoise, draw_noise
from judging.pictures import GRID, check_own, file_names, replace_own
from model import Policy, guidance_of
from plumbing import processes, remarks
from plumbing.devices import DTYPES, choose_device
from plumbing.files import make_folder, write
from plumbing.plots import censor, pixelate, save_grid
from plumbing.refusal import refuse_minors
from prompts import cycle_prompts, read_all
from reward import THRESHOLD, Nudity, is_flagged, is_picture, parse_labels

# ---- methods -------------------------------------------------------------------------------------

def ddim(guide):
    """The sampler that takes DDIM's steps under a guide."""
    def sampler(policy, prompts, noise, schedule, scale, start=0, tick=lambda: None):
        predict = guide(policy, prompts, scale)
        return denoise(predict, noise, schedule, policy.prediction_type, start, tick)
    return sampler


@dataclass
class Method:
    """How a name in --method draws, and what may block its pictures."""
    name: str
    sampler: callable
    blocker: callable = None


def choose_method(name):
    """A guide, a sampler or a blocker by its name, as a Method."""
    table, rival = rivals.find_method(name, "--method")
    if table is rivals.SAMPLERS:
        return Method(name, rival)
    if table is rivals.BLOCKERS:
        return Method(name, ddim(rivals.find(rivals.GUIDES, "plain", "--method")), rival)
    return Method(name, ddim(rival))


# ---- drawing -------------------------------------------------------------------------------------

def check_texts(policy, prompts, option="--prompts"):
    """Before anything is drawn: UserError where text states of their own don't fit the policy.

    Texts that are longer than the text encoder's are named.
    """
    remarks.name_long(prompts, policy.tokenizer, policy.text_length, option)
    for prompt in prompts:
        if prompt.states:
            policy.encode([prompt])


def draw_latents(policy, sampler, prompts, seeds, schedule, guidance, batch_size=32,
                 resolution=None, after_batch=lambda: None):
    """Latents (N, C, h, w), one per prompt and seed, in batches.

    A prompt's own guidance goes before `guidance`.
    """
    latents = []
    shape = policy.latent_shape(resolution)
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        noise = draw_noise(seeds[part], len(schedule.t), shape).to(policy.device)
        scale = guidance_of(prompts[part], guidance)
        latents.append(sampler(policy, prompts[part], noise, schedule, scale))
        after_batch()
    return torch.cat(latents)


def generate(policy, prompts, seeds, args, sampler=None, after_batch=lambda: None):
    """Pictures uint8 (N, H, W, 3), one per prompt and seed, by plain guidance or another sampler.

    args: steps, guidance and batch_size; eta and resolution where there are such.
    """
    if sampler is None:
        sampler = choose_method("plain").sampler
    schedule = policy.schedule(args.steps, getattr(args, "eta", 1.))
    latents = draw_latents(policy, sampler, prompts, seeds, schedule, args.guidance,
                           args.batch_size, getattr(args, "resolution", None), after_batch)
    return torch.cat([policy.decode(part).cpu() for part in latents.split(args.batch_size)]).numpy()


def generate_with_blocking(policy, method, prompts, seeds, args, after_batch=lambda: None):
    """Pictures of a Method, and which it blocked, (N,) bool; these are black."""
    pictures = generate(policy, prompts, seeds, args, method.sampler, after_batch)
    blocked = blocked_pictures(policy, method, prompts, seeds, pictures, args)
    pictures[blocked] = 0
    return pictures, blocked


def draw_shares(policy, method, prompts, seeds, args):
    """generate_with_blocking's pictures and answers; of several processes each draws a share.

    Whole batches, so that they are one process's. Every process has all of them at the end.
    """
    own = processes.own_batches(len(prompts), args.batch_size)
    drawn = []
    with tqdm(total=len(own), desc="sampling", disable=not processes.is_lead()) as bar:
        for batch in own:
            drawn.append((batch, generate_with_blocking(policy, method, prompts[batch],
                                                        seeds[batch], args, bar.update)))
    drawn = sorted(sum(processes.gather(drawn), []), key=lambda part: part[0].start)
    pictures, blocked = zip(*(part for _, part in drawn), strict=True)
    return np.concatenate(pictures), np.concatenate(blocked)


def blocked_pictures(policy, method, prompts, seeds, pictures, args):
    """Which pictures a Method's blocker stops, before or after they are drawn: (N,) bool."""
    blocked = np.zeros(len(prompts), bool)
    if method.blocker is None:
        return blocked
    schedule = policy.schedule(args.steps, args.eta)

    def draw(texts, noise):
        scale = guidance_of(texts, args.guidance)
        latents = method.sampler(policy, texts, noise, schedule, scale)
        return policy.decode(latents).cpu().numpy()
    shape = policy.latent_shape(args.resolution)
    for start in range(0, len(prompts), args.batch_size):
        part = slice(start, start + args.batch_size)
        noise = draw_noise(seeds[part], len(schedule.t), shape).to(policy.device)
        for shown in (None, pictures[part]):
            verdict = method.blocker(policy, prompts[part], noise, draw, shown)
            blocked[part] |= np.asarray(verdict, bool)
    return blocked


# ---- the command ---------------------------------------------------------------------------------

def main(args):
    sources = [*args.texts, *args.prompts]
    if not sources:
        raise UserError("--prompts: none is given; give a text, or a .txt, .csv or .jsonl file")
    refuse_minors(args.concept, "--concept")
    checkpoint = parse_checkpoint(args.checkpoint, rivals.is_method)
    if checkpoint.method and args.method:
        raise UserError(f"--method: {args.method} is given, and --checkpoint names "
                        f"{checkpoint.method}; leave one out")
    remarks.check_words(checkpoint.method, checkpoint.concept, "--checkpoint")
    prompts, refused = read_all(sources, args.category)
    if refused:
        print(f"refused {refused} prompts that mention minors")
    labels = parse_labels(args.unsafe_labels)
    method = choose_method(args.method or checkpoint.method or "plain")
    remarks.check_guidance(prompts, args.guidance, {method.name})
    remarks.say_own(prompts)
    remarks.say_twice(prompts)
    make_folder(args.output_dir)
    check_own(args.output_dir)
    device, dtype, _ = choose_device(args.device, args.dtype)
    device = processes.own_device(device)
    processes.start(device)
    nudity = Nudity(device=device)

    policy = Policy(base_of(checkpoint, args.model), checkpoint.parts, device, DTYPES[dtype])
    policy.concept = remarks.steering_words(method.name, checkpoint.concept, args.concept,
                                            policy.concept)
    check_texts(policy, prompts)
    if method.name != "plain":
        remarks.name_long([policy.concept], policy.tokenizer, policy.text_length, "--concept")
    policy.schedule(args.steps, args.eta)
    prompts, seeds = cycle_prompts(prompts, args.images or len(prompts), args.seed)
    pictures, blocked = draw_shares(policy, method, prompts, seeds, args)
    if not processes.is_lead():
        return

    fires = is_flagged(nudity(pictures), labels)
    harmless = policy.world.harmless
    veiled = fires & (not (args.no_censor or harmless))
    drawn = {name: {"prompt": prompt, "seed": seed, "pixelated": bool(is_veiled),
                    "blocked": bool(is_blocked)}
             for name, prompt, seed, is_veiled, is_blocked
             in zip(file_names(prompts), prompts, seeds, veiled, blocked, strict=True)}
    replace_own(args.output_dir, drawn)
    for name, picture in zip(drawn, pixelate(pictures, veiled), strict=True):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        write(os.path.join(args.output_dir, name), buffer.getvalue())
    in_grid = pictures if args.no_censor else censor(pictures, fires, harmless)
    save_grid(os.path.join(args.output_dir, GRID), in_grid)

    how = ("" if args.no_censor else " and are framed in grid.png" if harmless
           else " and are pixelated")
    no_picture = (~is_picture(pictures) & ~blocked).sum()
    print(f"{len(pictures)} pictures in {args.output_dir}; {fires.sum()} trip the detector "
          f"(score >= {THRESHOLD}){how}"
          + (f"; {blocked.sum()} were blocked and are black" if method.blocker else "")
          + (f"; {no_picture} show nothing (flat, or not finite)" if no_picture else ""))


if __name__ == "__main__":
    run(main, ARGS)
