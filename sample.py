"""Prompts to pictures: one seed a picture, the same picture in any batch, pixelated where NudeNet fires.

    python sample.py "a large peach on a blue background"                       # the base model
    python sample.py data/unsafe_unseen.csv --checkpoint out/shield --images 32  # a fine-tuned one
    python sample.py "a castle" --model CompVis/stable-diffusion-v1-4 --steps 50 --guidance 7.5

Writes one PNG a picture and grid.png into --output-dir. Pictures that trip the detector are pixelated;
--no-censor shows them.
"""
import argparse
import itertools
import json
import math
import os
import sys
from collections import defaultdict

from prompts import UserError, read, refuse_minors


def draw_noise(seeds, steps, shape):
    """(B, steps + 1, *shape) standard normal on the CPU, row b a function of seeds[b] alone."""
    import torch
    return torch.stack([torch.randn(steps + 1, *shape, generator=torch.Generator().manual_seed(int(s) % 2 ** 63))
                        for s in seeds])


def rollouts(policy, guide, prompts, seeds, schedule, guidance, batch_size=32, resolution=None, tick=lambda: None, keeps=()):
    """Denoise one picture a prompt and seed, in batches: yields (slice, predict, latents, log_probs) of each.

    A prompt's own guidance goes before `guidance`; keeps, one a batch or none, latents and log_probs are ddpo.rollout's.
    """
    from ddpo import rollout
    for start, keep in itertools.zip_longest(range(0, len(prompts), batch_size), keeps):
        part = slice(start, start + batch_size)
        noise = draw_noise(seeds[part], len(schedule.t), policy.latent_shape(resolution)).to(policy.device)
        predict = guide(policy, prompts[part], guidance_of(prompts[part], guidance))
        yield part, predict, *rollout(predict, noise, schedule, policy.prediction_type, tick, keep)


def generate(policy, guide, prompts, seeds, steps, eta, guidance, batch_size=32, resolution=None,
             tick=lambda: None):
    """Pictures uint8 (N, H, W, 3), one a prompt and seed."""
    import torch
    schedule = policy.schedule(steps, eta)
    batches = rollouts(policy, guide, prompts, seeds, schedule, guidance, batch_size, resolution, tick)
    return torch.cat([policy.decode(latents[:, -1]).cpu() for _, _, latents, _ in batches]).numpy()


def guidance_of(prompts, default):
    """The default where no prompt brings its own scale, else a tensor (B,)."""
    import torch
    own = [getattr(p, "guidance", None) for p in prompts]
    if all(g is None for g in own):
        return default
    return torch.tensor([default if g is None else g for g in own])


def pixelate(pictures, flags, blocks=8):
    """A copy of pictures uint8 (N, H, W, 3) in which the flagged ones are blocks x blocks squares."""
    import numpy as np
    from PIL import Image
    shown = np.array(pictures)
    for i in np.flatnonzero(flags):
        small = Image.fromarray(shown[i]).resize((blocks, blocks), Image.BOX)
        shown[i] = np.asarray(small.resize(shown[i].shape[1::-1], Image.NEAREST))
    return shown


def grid(pictures, columns=8, gap=2):
    """Pictures uint8 (N, H, W, 3) -> one PIL picture, row by row, on white."""
    import numpy as np
    from PIL import Image
    n, height, width, _ = np.shape(pictures)
    rows = -(-n // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        sheet[top:top + height, left:left + width] = picture
    return Image.fromarray(sheet)


def spread(prompts, count, seed):
    """`count` (prompt, seed) pairs: the prompts in turn; a prompt's own seed on its first turn."""
    picked = [prompts[i % len(prompts)] for i in range(count)]
    own = [p.seed if i < len(prompts) else None for i, p in enumerate(picked)]
    return picked, [seed + i if s is None else s for i, s in enumerate(own)]


def turns(prompts):
    """(case, turn) of each picture: its prompt's number, and how many of that number came before."""
    counts = defaultdict(itertools.count)
    return [(prompt.case, next(counts[prompt.case])) for prompt in prompts]


def file_names(prompts):
    """CASE.png each, or CASE_TURN.png where a case has several pictures: the names that evaluate.py --images reads."""
    pairs = turns(prompts)
    several = any(turn for _, turn in pairs)
    return [f"{case:05d}" + f"_{turn}" * several + ".png" for case, turn in pairs]


def choose_device(device, dtype, learning=False):
    """("auto", "auto") -> what this machine has, with the reason: (device, dtype name, reason).

    On a CPU pictures are drawn in fp32, the same ones on any machine; learning takes bf16 where the
    processor multiplies in it: measured on the tiny world, it samples 1.4 and learns 1.2 times faster.
    """
    import torch
    has_cuda = torch.cuda.is_available()
    if device == "auto":
        device = "cuda" if has_cuda else "cpu"
    try:
        asked = torch.device(device)
        known = asked.type == "cpu" or (asked.type == "cuda" and has_cuda
                                        and (asked.index or 0) < torch.cuda.device_count())
    except RuntimeError:
        known = False
    if not known:
        raise UserError(f"--device: {device} is not to be had here; give auto, cpu"
                        + "".join(f", cuda:{i}" for i in range(torch.cuda.device_count())))
    if dtype != "auto":
        return device, dtype, "as asked"
    if device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False):
        return device, "bf16", "the GPU computes in it natively; latents, log-probabilities, LoRA stay fp32"
    if learning and device == "cpu":
        can = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        if can.get("avx512_bf16") or can.get("amx_bf16"):
            return device, "bf16", "this processor multiplies in it; latents, log-probabilities, LoRA stay fp32"
        return device, "fp32", "this processor has no bf16 of its own"
    return device, "fp32", "exact, and the same on any machine"


def add_common_options(p):
    """Options that sampling, training and evaluation share."""
    p.add_argument("--steps", type=int, default=5, help="denoising steps a picture (DDIM); Stable Diffusion wants 50")
    p.add_argument("--eta", type=float, default=1., help="noise of DDIM's steps, above 0 to 1; 1 is DDPM's")
    p.add_argument("--guidance", type=float, default=2., help="classifier-free guidance scale; 1 is none; Stable Diffusion wants 5 to 7.5")
    p.add_argument("--concept", default=None, help="what guides steer away from, words with commas; the unsafe emoji, or: nudity, sexual")
    p.add_argument("--resolution", type=int, default=None, help="pixels a side; the model's own size if left out")
    p.add_argument("--unsafe-labels", default="strict", help="strict (five), exposed (nine), or NudeNet labels with commas")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--dtype", default="auto", choices=["auto", "fp32", "bf16"], help="what the network computes in; fp16 gives NaN")
    p.add_argument("--seed", type=int, default=0, help="everything random follows from it")


def check_common(args):
    """Ranges that argparse does not know; UserError names the option."""
    if args.eta <= 0 or args.eta > 1:
        raise UserError(f"--eta: {args.eta:g} is given; a step without noise has no log-probability, so 0 < eta <= 1")
    if not 1 <= args.steps <= 999:
        raise UserError(f"--steps: {args.steps} is given; 1 to 999 are allowed")
    if not 0 <= args.seed < 2 ** 62 or args.batch_size < 1:
        raise UserError(f"--seed is 0 or more, below 2^62, and --batch-size 1 or more; {args.seed} and {args.batch_size} are given")
    if not 1 <= args.guidance < math.inf:
        raise UserError(f"--guidance: {args.guidance:g} is given; 1 or more is needed, and 1 is none")
    refuse_minors(args.concept, "--concept")
    if args.resolution is not None and (args.resolution < 8 or args.resolution % 8):
        raise UserError(f"--resolution: {args.resolution} is given; a positive multiple of 8 is needed")


def run(main, args):
    """main(args); a UserError becomes one sentence on stderr and exit code 2."""
    try:
        main(args)
    except UserError as error:
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{os.path.basename(sys.argv[0])}: stopped; what it has kept stands", file=sys.stderr)
        sys.exit(130)


def base_of(checkpoint, model):
    """The base model's name: as given, else what the checkpoint was trained from, else tiny."""
    if model is None and checkpoint and os.path.isfile(os.path.join(checkpoint, "args.json")):
        return read_args(checkpoint, "--checkpoint").get("model", "tiny")
    return model or "tiny"


def read_args(folder, option="--output-dir"):
    """A run's args.json, {option: value}."""
    path = os.path.join(folder, "args.json")
    try:
        with open(path) as file:
            return {**json.load(file)}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{option}: {path} is no run's args.json ({type(error).__name__}); give another folder") from None


def make_folder(path, option="--output-dir"):
    try:
        os.makedirs(path, exist_ok=True)
        probe = os.path.join(path, f".probe{os.getpid()}")
        open(probe, "w").close()
        os.remove(probe)
    except OSError as error:
        raise UserError(f"{option}: {path} can't be written ({error.strerror}); give another folder") from None


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Prompts to pictures, with or without a fine-tuned checkpoint.")
    p.add_argument("prompts", help="a .txt, .csv or .jsonl file, or a literal text")
    p.add_argument("--model", default=None, help="folder or hub id; the checkpoint's base, else tiny")
    p.add_argument("--checkpoint", default=None, help="out/NAME of train.py, or a LoRA file; none: the base model")
    p.add_argument("--guide", default="plain", help="plain, negative, sld-weak, -medium, -strong, -max, safree, safree-always")
    p.add_argument("--category", default=None, help="only prompts of this category (I2P: sexual)")
    p.add_argument("--images", type=int, default=None, help="pictures in all, the prompts in turn; one each if left out")
    p.add_argument("--batch-size", type=int, default=32, help="pictures at once; does not change them")
    p.add_argument("--output-dir", default="out/samples", help="folder of the PNGs")
    p.add_argument("--no-censor", action="store_true", help="do not pixelate pictures that trip the detector")
    add_common_options(p)
    return p.parse_args(argv)


def main(args):
    check_common(args)
    if args.images is not None and args.images < 1:
        raise UserError(f"--images: {args.images} is given; at least 1 is needed")
    prompts, refused = read(args.prompts, args.category, option="prompts")
    if refused:
        print(f"refused {refused} prompts that mention minors")
    from PIL import Image
    from tqdm import tqdm
    from guide import choose_guide
    from model import DTYPES, Policy
    from reward import EXPOSED, LABELS, THRESHOLD, Nudity, parse_labels
    labels = parse_labels(args.unsafe_labels)
    make_folder(args.output_dir)
    device, dtype, _ = choose_device(args.device, args.dtype)
    policy = Policy(base_of(args.checkpoint, args.model), args.checkpoint, device, DTYPES[dtype])
    policy.concept = args.concept or policy.concept
    guide = choose_guide(args.guide)
    prompts, seeds = spread(prompts, args.images or len(prompts), args.seed)
    batches = -(-len(prompts) // args.batch_size)
    with tqdm(total=batches * args.steps, desc="sampling") as bar:
        pictures = generate(policy, guide, prompts, seeds, args.steps, args.eta, args.guidance,
                            args.batch_size, args.resolution, bar.update)
    fires = Nudity()(pictures)[:, [LABELS.index(label) for label in {*labels, *EXPOSED}]].max(1) >= THRESHOLD
    shown = pictures if args.no_censor else pixelate(pictures, fires)
    try:
        for name, picture in zip(file_names(prompts), shown):
            Image.fromarray(picture).save(os.path.join(args.output_dir, name))
        grid(shown).save(os.path.join(args.output_dir, "grid.png"))
    except OSError as error:
        raise UserError(f"--output-dir: {args.output_dir} can't be written ({error.strerror})") from None
    print(f"{len(pictures)} pictures in {args.output_dir}; {fires.sum()} trip the detector "
          f"(score >= {THRESHOLD}){'' if args.no_censor else ' and are pixelated'}")


if __name__ == "__main__":
    run(main, parse_args())
