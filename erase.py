"""The weight-editing rivals: one loss each over one short loop.

    python erase.py esd-x                               # the embedded world; esd-u, sdd and safegen likewise
    python erase.py esd-u --model CompVis/stable-diffusion-v1-4 --concept nudity --steps 50 \
        --negative-guidance 1 --lr 1e-5 --iterations 1000 --batch-size 1 --output-dir out/sd-esd-u
    python evaluate.py --checkpoint out/shield out/esd-x out/esd-u out/sdd out/safegen

Written from the papers' formulas. Ours for all four: the concept is several names (--concept) or a prompt file, of which every
iteration draws a batch; pictures are made on the project's own schedule (--steps, --eta); Adam without weight decay. Writes into
--output-dir: args.json, metrics.jsonl, checkpoints/, unet/ (or the LoRA in diffusers' and kohya's formats), a model card.
Cut off at any moment, the same command goes on to the same result.
"""
import argparse
import os
import re
from collections import namedtuple
from contextlib import contextmanager

from card import model_card
from checkpoint import check_folder, load_checkpoint, save_checkpoint, write, write_metrics
from prompts import UserError, read, walk
from sample import add_common_options, check_common, choose_device, draw_noise, generate, pixelate, run, spread

MOSAIC = 4                              # of the tiny world's 8 x 8 mosaics 29 % trip the detector after the VAE, of 4 x 4 ones 2 %

# What a method's step works with. Weights {name: tensor} of what is trained: trained now, start before training, teacher's
# average or None; pictures: what the method prepared
Job = namedtuple("Job", "policy trained start teacher schedule pictures args")


# ---- the losses: letters as in the papers, e(x, t, c) the network's output, all (B, C, h, w) ------------------------

def esd_loss(e_c, base_c, base_empty, eta):
    """ESD (arXiv 2303.07345, section 4): the squared error of e_theta(x_t, c) to e(x_t, "") - eta (e(x_t, c) - e(x_t, "")).

    base_ are the frozen model's. The target's coefficients sum to 1, so that it is the same whether the outputs are epsilon
    or v (the tiny world's): v is linear in epsilon at a given x_t. Only a step's weight differs: v's error is epsilon's / a_t, so that
    the noisiest steps count most. At eta 0 the prompt is erased, above it is negated.
    """
    return ((e_c - (base_empty - eta * (base_c - base_empty))) ** 2).mean()


def sdd_loss(e_c, e_empty):
    """SDD (arXiv 2307.05977): || sg[e_theta(z_t, "")] - e_theta(z_t, c) ||^2, both the student's, without gradient through the first."""
    return ((e_c - e_empty.detach()) ** 2).mean()


def safegen_loss(e_n, target_n, e_b, target_b, weight=.1):
    """SafeGen (arXiv 2404.06666): w || e_theta(z_n, t) - ((z_n - z_m) + e) ||^2 + (1 - w) || e_theta(z_b, t) - e_b ||^2.

    n nude, m mosaic, b benign. For a v model both targets are turned into v, which weighs step t by 1 / a_t of epsilon's error.
    """
    return weight * ((e_n - target_n) ** 2).mean() + (1 - weight) * ((e_b - target_b) ** 2).mean()


def as_output(eps, x, a, prediction_type):
    """A noise prediction at x_t as the network would put it: v = sqrt(a) eps - sqrt(1 - a) x0 with x0 from x_t and eps."""
    return eps if prediction_type == "epsilon" else (eps - (1 - a).sqrt() * x) / a.sqrt()


# ---- a step of each method: (job, its prompts, random numbers) -> the loss ----------------------------------------

def esd(job, texts, rng):
    """x_t comes from the model being trained; one random step a batch."""
    x, t = on_the_way(job, texts, rng)
    e, c, empty = job.policy.unet_output, *states(job.policy, texts)
    with wearing(job.trained, job.start):
        base_c, base_empty = e(x, t, c), e(x, t, empty)
    return esd_loss(e(x, t, c), base_c, base_empty, job.args.negative_guidance)


def sdd(job, texts, rng):
    """z_t comes from the teacher, the average of the students. The authors guide it by all concepts in one prompt, we by the batch's."""
    import torch
    with wearing(job.trained, job.teacher):
        x, t = on_the_way(job, texts, rng)
    e, c, empty = job.policy.unet_output, *states(job.policy, texts)
    with torch.no_grad():
        e_empty = e(x, t, empty)
    return sdd_loss(e(x, t, c), e_empty)


def safegen(job, texts, rng):
    """Random timesteps of a batch of triples. z_n and z_m are noised by the same e, so they differ by sqrt(a) times their pictures."""
    import torch
    nude, mosaic, benign = job.pictures
    policy, size = job.policy, job.args.batch_size
    i, j = rng.integers(len(nude), size=size), rng.integers(len(benign), size=size)
    e = draw_noise(rng.integers(2 ** 62, size=2 * size), 0, nude.shape[1:])[:, 0].to(policy.device)     # (2B, C, h, w)
    t = torch.from_numpy(rng.integers(len(policy.scheduler.alphas_cumprod), size=2 * size)).to(policy.device)
    a = policy.scheduler.alphas_cumprod.to(policy.device)[t].view(-1, 1, 1, 1)
    noised = lambda z, part: a[part].sqrt() * z + (1 - a[part]).sqrt() * e[part]
    first, last = slice(size), slice(size, None)
    z_n, z_m, z_b = noised(nude[i], first), noised(mosaic[i], first), noised(benign[j], last)
    output = policy.unet_output(torch.cat([z_n, z_b]), t, policy.encode([""] * (2 * size)))
    targets = [as_output(eps, z, a[part], policy.prediction_type)
               for eps, z, part in ((z_n - z_m + e[first], z_n, first), (e[last], z_b, last))]
    return safegen_loss(output[first], targets[0], output[last], targets[1], job.args.mosaic_weight)


def on_the_way(job, texts, rng):
    """Sample with --start-guidance up to a random step: latents (B, C, h, w) there, and its timestep."""
    from ddpo import rollout
    from guide import plain
    k = int(rng.integers(len(job.schedule.t)))
    noise = draw_noise(rng.integers(2 ** 62, size=len(texts)), k, job.policy.latent_shape(job.args.resolution)).to(job.policy.device)
    if k == 0:
        return noise[:, 0], job.schedule.t[0]
    before = type(job.schedule)(*(row[:k] for row in job.schedule))
    path, _ = rollout(plain(job.policy, texts, job.args.start_guidance), noise, before, job.policy.prediction_type)
    return path[:, -1], job.schedule.t[k]


def states(policy, texts):
    """Text states of the prompts, and as many of the empty one."""
    return policy.encode(texts), policy.encode([""] * len(texts))


@contextmanager
def wearing(trained, weights):
    """Within it the trained parameters are these and nothing has a gradient: the frozen model's, the teacher's, without a second UNet."""
    import torch
    own = {name: p.data for name, p in trained.items()}
    try:
        with torch.no_grad():
            for name, p in trained.items():
                p.data = weights[name]
            yield
    finally:
        for name, p in trained.items():
            p.data = own[name]


# ---- SafeGen's pictures -------------------------------------------------------------------------------------------

def triples(policy, prompts, benign, labels, args):
    """Latents (nude, mosaic, benign) of the model's own pictures, in memory alone: those of --prompts that trip the detector, the
    same as MOSAIC x MOSAIC squares, and those of --benign that do not. The authors have real pictures and a learned mosaic of parts."""
    from guide import plain
    from reward import LABELS, THRESHOLD, Nudity
    if not benign:
        raise UserError(f"--benign: {args.method} needs prompts of what has to stay; give a file or a text")
    columns, nudity = [LABELS.index(label) for label in labels], Nudity()
    kept = []
    for source, trips in ((prompts, True), (benign, False)):
        picked, seeds = spread(source, args.pictures, args.seed)
        pictures = generate(policy, plain, picked, seeds, args.steps, args.eta, args.guidance, args.batch_size, args.resolution)
        kept.append(pictures[(nudity(pictures)[:, columns].max(1) >= THRESHOLD) == trips])
    if not len(kept[0]) or not len(kept[1]):
        raise UserError(f"--pictures: of {args.pictures} pictures each, {len(kept[0])} of --prompts trip the detector and {len(kept[1])} of "
                        f"--benign do not; {args.method} needs some of both")
    print(f"triples        {len(kept[0])} nude pictures and their mosaics, {len(kept[1])} benign ones", flush=True)
    nude, benign = kept
    return [to_latents(policy, pictures) for pictures in (nude, pixelate(nude, [True] * len(nude), MOSAIC), benign)]


def to_latents(policy, pictures):
    """Pictures uint8 (N, H, W, 3) -> scaled latents (N, C, h, w), of which policy.decode is the way back."""
    import torch
    x = torch.from_numpy(pictures).to(policy.device).permute(0, 3, 1, 2).float() / 127.5 - 1                # -1..1
    with torch.no_grad():
        found = [policy.vae.encode(part) for part in x.split(16)]
    latents = [z.latents if hasattr(z, "latents") else z.latent_dist.mode() for z in found]
    return torch.cat(latents) * policy.vae.config.scaling_factor


# ---- the table ----------------------------------------------------------------------------------------------------

# weights: the names of what learns begin like this; prepare(policy, prompts, benign, labels, args): made once; teacher: whether an average
# is kept, and saved in the end as SDD does; defaults: of a few tried on the tiny world's weights; of a LoRA's only esd-x's is
Method = namedtuple("Method", "step weights prepare teacher defaults")
METHODS = {
    "esd-x": Method(esd, r".*attn2", None, False, dict(iterations=150, weights_lr=2e-4, lora_lr=3e-4)),
    "esd-u": Method(esd, r"(?!.*attn2)", None, False, dict(iterations=150, weights_lr=4e-5, lora_lr=1e-3)),
    "sdd": Method(sdd, r".*attn2", None, True, dict(iterations=150, weights_lr=1.4e-4, lora_lr=1e-3, warm_up=50)),
    "safegen": Method(safegen, r".*attn1", triples, False, dict(iterations=300, weights_lr=1e-3, lora_lr=1e-3)),
}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Erase a concept from a text-to-image model's weights by ESD, SDD or SafeGen.")
    g = p.add_argument_group("what is trained, on what")
    g.add_argument("method", choices=list(METHODS), help="learn cross-attention (esd-x, sdd), all else (esd-u), self-attention (safegen)")
    g.add_argument("--model", default="tiny", help="folder or hub id in Stable Diffusion 1.x's format")
    g.add_argument("--prompts", default=None, help="file or text: what has to be erased; the names in --concept if left out, data/unsafe_train.csv for safegen")
    g.add_argument("--benign", default=None, help="safegen: what has to stay; data/benign_train.csv beside the default prompts")
    g.add_argument("--category", default=None, help="only --prompts of this category (I2P: sexual)")
    g.add_argument("--trainable", default="weights", choices=["weights", "lora"], help="the weights themselves, or a LoRA on their layers")
    g.add_argument("--rank", type=int, default=16, help="rank of the LoRA")
    g = p.add_argument_group("learning")
    own = lambda name: ", ".join(f"{m.defaults[name]:g} for {method}" for method, m in METHODS.items())
    g.add_argument("--iterations", type=int, default=None, help=f"updates; {own('iterations')}")
    g.add_argument("--lr", type=float, default=None, help=f"learning rate; {own('weights_lr')}; of a LoRA {own('lora_lr')}; the papers: 1e-5")
    g.add_argument("--warm-up", type=int, default=None, help="iterations over which the rate rises; 50 for sdd, else 0; SDD: 500 of 1500")
    g.add_argument("--batch-size", type=int, default=16, help="prompts (safegen: triples) an iteration")
    g.add_argument("--negative-guidance", type=float, default=1., help="ESD's eta: how far beyond the empty prompt; 0 stops there")
    g.add_argument("--start-guidance", type=float, default=3., help="guidance on the way to x_t (ESD, SDD)")
    g.add_argument("--ema", type=float, default=.95, help="decay of SDD's teacher, which is what is saved; the paper: .999, over 1500 iterations")
    g.add_argument("--mosaic-weight", type=float, default=.5, help="SafeGen's weight of the mosaics, the paper: .1; benign pictures have the rest of 1")
    g.add_argument("--pictures", type=int, default=256, help="SafeGen's pictures of each prompt file")
    g = p.add_argument_group("output")
    g.add_argument("--output-dir", default=None, help="folder of the run, out/METHOD if left out; the same command goes on there")
    g.add_argument("--save-every", type=int, default=50, help="iterations between checkpoints, and of a row of metrics.jsonl")
    add_common_options(p)
    return p.parse_args(argv)


def check(args):
    """Everything that can be said before a model is loaded; fills in what follows from other options."""
    defaults = METHODS[args.method].defaults
    if args.prompts is None and METHODS[args.method].prepare:
        args.prompts = "data/unsafe_train.csv"
    if args.benign is None and args.prompts == "data/unsafe_train.csv":
        args.benign = "data/benign_train.csv"
    for option, default in (("iterations", defaults["iterations"]), ("lr", defaults[f"{args.trainable}_lr"]),
                            ("warm_up", defaults.get("warm_up", 0)), ("output_dir", os.path.join("out", args.method))):
        if getattr(args, option) is None:
            setattr(args, option, default)
    check_common(args)
    for option, least in (("iterations", 1), ("rank", 1), ("pictures", 1), ("save-every", 1), ("warm-up", 0), ("negative-guidance", 0)):
        if getattr(args, option.replace("-", "_")) < least:
            raise UserError(f"--{option}: {getattr(args, option.replace('-', '_')):g} is given; at least {least} is needed")
    if not args.lr > 0:
        raise UserError(f"--lr: {args.lr:g} is given; it must be above 0")
    if not 0 <= args.ema < 1 or not 0 <= args.mosaic_weight <= 1:
        raise UserError(f"--ema is 0 to below 1 and --mosaic-weight 0 to 1; {args.ema:g} and {args.mosaic_weight:g} are given")


def choose_weights(policy, pattern, args):
    """Let learn what the method names, or LoRAs on those layers; the trained parameters by name."""
    from model import LORA_TARGETS
    if args.trainable == "lora":
        return policy.train("lora", args.rank, rf"{pattern}.*\.({'|'.join(map(re.escape, LORA_TARGETS['all']))})")
    every = policy.train("full")                        # float32, the frozen ones too: they are saved as they were
    for name, p in every.items():
        p.requires_grad_(bool(re.match(pattern, name)))
    return {name: p for name, p in every.items() if p.requires_grad}


# ---- the loop -----------------------------------------------------------------------------------------------------

def main(args):
    check(args)
    method = METHODS[args.method]
    prompts, refused = read(args.prompts, args.category) if args.prompts else (None, 0)
    benign, more = read(args.benign, option="--benign") if args.benign and method.prepare else ([], 0)
    device, dtype, why = choose_device(args.device, args.dtype, learning=True)
    import numpy as np
    import torch
    from tqdm import tqdm
    from model import DTYPES, Policy
    from reward import parse_labels
    labels = parse_labels(args.unsafe_labels)
    settings = check_folder(args)

    torch.manual_seed(args.seed)
    policy = Policy(args.model, None, device, DTYPES[dtype], trainable=True)
    if not prompts:
        prompts = [read(name.strip(), option="--concept")[0][0] for name in (args.concept or policy.concept).split(",")]
    trained = choose_weights(policy, method.weights, args)
    copy = lambda: {name: p.detach().clone() for name, p in trained.items()}
    write(os.path.join(args.output_dir, "args.json"), settings)             # from here on the folder is this run's
    count = lambda parameters: f"{sum(p.numel() for p in parameters) / 1e6:.2f} M"
    print(f"model          {args.model}, {policy.prediction_type}; {args.method} trains {count(trained.values())} of "
          f"{count(policy.unet.parameters())} UNet weights ({args.trainable})\n"
          f"device         {device}, {dtype}: {why}\n"
          f"prompts        {len(prompts)} to erase, {len(benign)} benign; {refused + more} refused for mentioning minors\n"
          f"learning       {args.iterations} updates of {args.batch_size} at a rate of {args.lr:g}", flush=True)
    pictures = method.prepare and method.prepare(policy, prompts, benign, labels, args)     # by the base: nothing is learned yet
    job = Job(policy, trained, copy(), copy() if method.teacher else None, policy.schedule(args.steps, args.eta), pictures, args)
    optimizer = torch.optim.AdamW(trained.values(), lr=args.lr, weight_decay=0.)

    checkpoints, rows, losses = os.path.join(args.output_dir, "checkpoints"), [], []
    state = load_checkpoint(checkpoints)
    if state:
        for weights, saved in ((trained, state["weights"]), (job.teacher or {}, state["teacher"])):
            for name, p in weights.items():
                p.data.copy_(saved[name])
        optimizer.load_state_dict(state["optimizer"])
        rows = state["rows"]
        write_metrics(args.output_dir, rows)            # forget what came after the checkpoint
        print(f"going on after iteration {state['epoch']}", flush=True)

    done = state["epoch"] if state else 0
    bar = tqdm(range(done, args.iterations), initial=done, total=args.iterations, desc=args.method)
    for i in bar:
        rng = np.random.default_rng([args.seed, i])     # an iteration's randomness is its number's, so that a resumed run is the same
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (i + 1) / max(1, args.warm_up))
        loss = method.step(job, walk(prompts, args.batch_size, args.seed, i + 1), rng)
        if not torch.isfinite(loss):
            raise UserError(f"iteration {i + 1}: the loss is {loss.item()}; the update was refused, the last good checkpoint stands")
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), float("inf"))
        if not torch.isfinite(norm):
            raise UserError(f"iteration {i + 1}: the gradient is {norm.item()}; the update was refused, the last good checkpoint stands")
        optimizer.step()
        optimizer.zero_grad()
        for name, average in (job.teacher or {}).items():
            average.lerp_(trained[name].detach(), 1 - args.ema)
        losses.append(loss.item())
        bar.set_postfix(loss=f"{loss.item():.4f}")
        if (i + 1) % args.save_every == 0 or i + 1 == args.iterations:
            rows.append({"iteration": i + 1, "loss": float(np.mean(losses)), "lr": group["lr"]})
            losses = []
            write_metrics(args.output_dir, rows)
            save_checkpoint(checkpoints, {"epoch": i + 1, "rows": rows, "weights": copy(), "teacher": job.teacher or {},
                                          "optimizer": optimizer.state_dict()})
    with wearing(trained, job.teacher or copy()):
        what = f"with a concept erased by {args.method}: {method.step.__name__}_loss in erase.py names its paper."
        policy.save(args.output_dir, model_card(args, what, args.method, rows[-1]))
    print(f"the model is in {args.output_dir}", flush=True)


if __name__ == "__main__":
    run(main, parse_args())
