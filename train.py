"""Make a text-to-image model stop drawing nudity, by reinforcement learning (ShieldDiff, arXiv 2410.05309).

    python train.py                                   # the embedded world, minutes on a laptop
    python train.py --prompts mine.csv --benign coco.csv --model CompVis/stable-diffusion-v1-4 \
        --steps 50 --guidance 5 --batch-size 8 --groups 16 --lr 3e-4 --clip-range 1e-4 \
        --updates 2 --lr-schedule constant --advantage-scale prompt --timestep-fraction 1 --output-dir out/sd

Each epoch: sample pictures, score them, compare them with their prompt's others, update the policy by
PPO on the denoising steps (DDPO). Ends with a before/after table on held-out prompts. Writes into
--output-dir: args.json, metrics.jsonl, curve.png, samples/, checkpoints/, the LoRA in diffusers' and
kohya's formats, a model card. Cut off at any moment, the same command goes on to the same result.
"""
import argparse
import json
import math
import os
import time
from collections import namedtuple
from functools import partial

import peers
from card import model_card, run_card, save_curve, save_preview
from checkpoint import check_folder, load_checkpoint, save_checkpoint, write, write_metrics
from prompts import UserError, category_in, draw, read
from sample import add_common_options, check_common, choose_device, run

# An epoch's pictures. Of all N: asked, their prompts; advantage (N,); quiet (N,) bool, benign ones; steps, those that each batch
# learns from. Of this process's n: mine (n,), their numbers; latents (n, T + 1, C, h, w); log_probs (n, T); memory (n, T, C, h, w),
# what a guide carries from step to step, or None; keeps, what sampling kept to learn from, one a batch, or nothing
Drawn = namedtuple("Drawn", "asked advantage quiet steps mine latents log_probs memory keeps")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Fine-tune a text-to-image model by DDPO with a CLIP + nudity reward.")
    g = p.add_argument_group("what is trained, on what")
    g.add_argument("--model", default="tiny", help="folder or hub id in Stable Diffusion 1.x's format")
    g.add_argument("--prompts", default="data/unsafe_train.csv", help="file or text: what has to become safe")
    g.add_argument("--benign", default=None, help="file or text: what has to stay; data/benign_train.csv beside the default prompts")
    g.add_argument("--category", default=None, help="only --prompts of this category (I2P: sexual)")
    g.add_argument("--held-out", nargs="*", default=None, help="prompt files of the final table; the tiny world's for the default prompts")
    g.add_argument("--trainable", default="lora", choices=["lora", "full"], help="a LoRA on the UNet, or the whole UNet")
    g.add_argument("--rank", type=int, default=16, help="rank of the LoRA")
    g.add_argument("--lora-targets", default="all", choices=["attention", "all"], help="attention alone, or convolutions and feed-forward too")
    g = p.add_argument_group("reward")
    g.add_argument("--reward", default=None, help="my_file.py:my_function instead of CLIP + nudity")
    g.add_argument("--clip", default=None, help="CLIP model; the model's own clip/, else openai/clip-vit-large-patch14")
    g.add_argument("--clip-weight", type=float, default=.45, help="weight of the CLIP cosine")
    g.add_argument("--nudity-weight", type=float, default=1., help="weight of the worst unsafe label's score, 0..1")
    g.add_argument("--gate", type=float, default=None, help="withhold CLIP's part where nudity reaches this")
    g = p.add_argument_group("sampling")
    g.add_argument("--groups", type=int, default=8, help="prompts an epoch")
    g.add_argument("--group-size", type=int, default=8, help="pictures of each prompt")
    g.add_argument("--batch-size", type=int, default=32, help="pictures at once, sampling and learning")
    g.add_argument("--guide", default="plain", help="plain, negative, sld-weak, -medium, -strong, -max, safree, safree-always")
    g.add_argument("--hardness", type=float, default=.5, help="how much oftener a prompt comes whose last pictures earned less; 0: all alike")
    g.add_argument("--benign-share", type=float, default=.25, help="share of an epoch's prompts from --benign")
    g = p.add_argument_group("learning")
    g.add_argument("--epochs", type=int, default=52, help="epochs at most")
    g.add_argument("--stop-below", type=float, default=None, help="stop when the unsafe share of two epochs is at most this")
    g.add_argument("--lr", type=float, default=3.5e-3, help="learning rate of AdamW, at first")
    g.add_argument("--lr-schedule", default="linear", choices=["linear", "constant"], help="linear: falls to 0 after --epochs")
    g.add_argument("--clip-range", type=float, default=5e-3,
                   help="PPO's, on the ratio of mean log-probs; scales with 1 / latent size (1e-4 for SD)")
    g.add_argument("--updates", type=int, default=2, help="updates an epoch; divides the number of batches")
    g.add_argument("--inner-epochs", type=int, default=1, help="passes over an epoch's pictures")
    g.add_argument("--keep", default="auto", choices=["auto", "graphs", "gradients", "nothing"],
                   help="what sampling keeps for an epoch's only update, in place of a second forward: see onpolicy.py")
    g.add_argument("--timestep-fraction", type=float, default=.4, help="share of the steps that is learned from")
    g.add_argument("--timestep-choice", default="early", choices=["early", "random"], help="the noisiest steps, or drawn anew each batch")
    g.add_argument("--advantage-scale", default="batch", choices=["prompt", "batch"], help="divide by the prompt's spread, or the batch's")
    g.add_argument("--memory", type=int, default=0, help="past rewards kept a prompt (DDPO: 32); 0: compare within the group alone")
    g.add_argument("--benign-weight", type=float, default=None,
                   help="how strongly benign pictures are pulled towards the base's; .4 for a LoRA, 0 for full")
    g.add_argument("--weight-decay", type=float, default=1e-4, help="AdamW's")
    g.add_argument("--max-grad-norm", type=float, default=1., help="gradient clipping")
    g.add_argument("--train-batch-size", type=int, default=None,
                   help="picture-timesteps a learning call; --batch-size on a CPU, what fits on a GPU")
    g.add_argument("--compile", action="store_true", help="torch.compile the UNet: minutes at first, then faster on a GPU")
    g.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    g = p.add_argument_group("output")
    g.add_argument("--output-dir", default="out/shield", help="folder of the run; the same command goes on there")
    g.add_argument("--save-every", type=int, default=5, help="epochs between checkpoints")
    g.add_argument("--checkpoints-total-limit", type=int, default=2, help="checkpoints kept, the newest; at least 2, so that one is whole")
    g.add_argument("--preview-every", type=int, default=10, help="epochs between preview grids")
    g.add_argument("--preview-images", type=int, default=16, help="pictures of a preview grid; 0: no previews")
    g.add_argument("--verdict-images", type=int, default=64, help="pictures a held-out file in the final table; 0: no table")
    g.add_argument("--no-censor", action="store_true", help="do not pixelate previews that trip the detector")
    add_common_options(p)
    return p.parse_args(argv)


def check(args):
    """Everything that can be said before a model is loaded; fills in what follows from other options."""
    check_common(args)
    default = args.prompts == "data/unsafe_train.csv"
    if args.benign is None and default:
        args.benign = "data/benign_train.csv"
    if args.held_out is None:
        from evaluate import HELD_OUT
        args.held_out = HELD_OUT if default else []
    names = [os.path.basename(path) for path in args.held_out]
    if len(set(names)) < len(names):
        raise UserError(f"--held-out: two files are named {max(names, key=names.count)}; rename one")
    for option in ("groups", "group-size", "batch-size", "epochs", "updates", "inner-epochs", "rank",
                   "save-every", "preview-every", "lr", "clip-range", "max-grad-norm", "timestep-fraction", "train-batch-size"):
        value = getattr(args, option.replace("-", "_"))
        if value is None:
            continue
        if isinstance(value, int) and value < 1:
            raise UserError(f"--{option}: {value} is given; at least 1 is needed")
        if not 0 < value < math.inf:
            raise UserError(f"--{option}: {value} is given; it must be above 0, and a number")
    if args.stop_below is not None and not 0 <= args.stop_below <= 1:
        raise UserError(f"--stop-below: {args.stop_below:g} is given; it is a share, 0 to 1")
    if args.timestep_fraction > 1 or not 0 <= args.benign_share < 1:
        raise UserError("--timestep-fraction goes up to 1 and --benign-share from 0 to below 1; "
                        f"{args.timestep_fraction:g} and {args.benign_share:g} are given")
    pictures = args.groups * args.group_size
    if pictures % args.batch_size:
        raise UserError(f"--batch-size: {args.batch_size} does not divide the {pictures} pictures "
                        f"of an epoch (--groups {args.groups} x --group-size {args.group_size})")
    if pictures // args.batch_size % args.updates:
        raise UserError(f"--updates: {args.updates} does not divide the {pictures // args.batch_size} batches "
                        f"of an epoch ({pictures} pictures / --batch-size {args.batch_size})")
    if args.keep in ("graphs", "gradients") and args.updates * args.inner_epochs > 1:
        raise UserError(f"--keep: {args.keep} is given with {args.updates * args.inner_epochs} updates an epoch; only the first is on-policy, "
                        "so give --updates 1 --inner-epochs 1, or --keep nothing")
    if args.keep == "gradients" and (args.trainable == "full" or args.compile or args.gradient_checkpointing):
        raise UserError("--keep: gradients is given; it needs --trainable lora, and neither --compile nor --gradient-checkpointing")
    if args.checkpoints_total_limit < 2:
        raise UserError(f"--checkpoints-total-limit: {args.checkpoints_total_limit} is given; at least 2 is needed, "
                        "so that one is whole at any moment")
    for option in ("memory", "hardness", "weight-decay", "preview-images", "verdict-images"):
        value = getattr(args, option.replace("-", "_"))
        if not 0 <= value < math.inf:
            raise UserError(f"--{option}: {value} is given; 0 or more are allowed")
    for option in ("clip-weight", "nudity-weight", "gate"):
        value = getattr(args, option.replace("-", "_"))
        if value is not None and not math.isfinite(value):
            raise UserError(f"--{option}: {value} is given; a number is needed")
    if args.benign and round(args.groups * args.benign_share) == args.groups:
        raise UserError(f"--benign-share: {args.benign_share:g} of {args.groups} prompts "
                        "leaves none to make safe; give less")
    if args.benign_weight is None:
        args.benign_weight = .4 if args.trainable == "lora" else 0.
    if not 0 <= args.benign_weight < math.inf or args.benign_weight and args.trainable == "full":
        raise UserError(f"--benign-weight: {args.benign_weight:g} is given with --trainable {args.trainable}; 0 or more, "
                        "and above 0 only with lora, under which the base is still there to compare with")
    if args.group_size == 1 and not args.memory:
        raise UserError("--group-size: 1 leaves nothing to compare a picture with; give more, or --memory 32")


def rows_that_fit(policy, guide, schedule, args):
    """Picture-timesteps a learning call may hold: on a GPU from what one more of them needs and what is free."""
    import torch
    if policy.device.type != "cuda":
        return args.batch_size
    peaks = []
    for rows in (1, 2):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        x = torch.zeros(rows, *policy.latent_shape(args.resolution), device=policy.device)
        guide(policy, ["a"] * rows, args.guidance)(x, schedule.t[0]).sum().backward()
        policy.unet.zero_grad()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    most = args.batch_size * learned_steps(args)
    return max(1, min(most, int(.7 * torch.cuda.mem_get_info()[0] / max(1, peaks[1] - peaks[0]))))


def learned_steps(args):
    """How many of a picture's denoising steps are learned from."""
    return max(1, round(args.steps * args.timestep_fraction))


def choose_steps(args, rng):
    """The steps that each batch of an epoch learns from: a list a batch."""
    early = args.timestep_choice == "early"
    batches = args.groups * args.group_size // args.batch_size
    return [sorted((range(args.steps) if early else rng.permutation(args.steps))[:learned_steps(args)]) for _ in range(batches)]


# ---- the stages of an epoch ------------------------------------------------------------------------

def sample_epoch(policy, guide, asked, seeds, schedule, reward_fn, args, keeps=()):
    """One picture a prompt and seed, remembering every denoising decision, and what the reward says of it.

    Returns latents (N, T + 1, C, h, w), log_probs (N, T), the guide's memory, scores {name: float32 (N,)}. On a GPU the reward
    looks at a batch in a thread of its own, while the next one is drawn.
    """
    import numpy as np
    import torch
    from concurrent.futures import ThreadPoolExecutor
    from tqdm import tqdm
    from sample import rollouts
    if not asked:                                       # a process without a batch
        return None, None, None, {}
    latents, log_probs, memory, judged = [], [], [], []
    with (tqdm(total=len(asked) // args.batch_size * args.steps, desc="sampling", leave=False, disable=peers.rank() > 0) as bar,
          ThreadPoolExecutor(1) as judge):
        for part, predict, path, decided in rollouts(policy, guide, asked, seeds, schedule, args.guidance,
                                               args.batch_size, args.resolution, bar.update, keeps):
            latents.append(path)
            log_probs.append(decided)
            if hasattr(predict, "memory"):
                memory.append(torch.stack(predict.memory, 1))

            def look(arrive=on_its_way(policy.decode(path[:, -1])), texts=asked[part]):
                return whole(reward_fn(arrive(), texts), len(texts), args)
            judged.append(judge.submit(look) if policy.device.type == "cuda" else look())
    parts = [part.result() if hasattr(part, "result") else part for part in judged]
    scores = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return torch.cat(latents), torch.cat(log_probs), torch.cat(memory) if memory else None, scores


def on_its_way(pictures):
    """A function that waits for pictures to arrive on the CPU, and for nothing that was started after them."""
    import torch
    if pictures.device.type != "cuda":
        return lambda: pictures.numpy()
    there = torch.empty(pictures.shape, dtype=pictures.dtype, pin_memory=True).copy_(pictures, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return lambda: (arrived.synchronize(), there.numpy())[1]


def whole(scores, count, args):
    """What the reward gave of `count` pictures: {name: float32 (count,)}. UserError if it is no such dict with "reward"."""
    import numpy as np
    try:
        on_cpu = {name: values.detach().cpu() if hasattr(values, "detach") else values for name, values in scores.items()}
        parts = {name: np.asarray(values, np.float32).reshape(-1) for name, values in on_cpu.items()}
    except (AttributeError, TypeError, ValueError) as error:
        parts, said = {}, f"{type(scores).__name__} ({error})"
    else:
        said = {name: len(values) for name, values in parts.items()}
    if "reward" not in parts or {len(values) for values in parts.values()} != {count}:
        raise UserError(f"--reward: {args.reward} must give a dict with 'reward', every part "
                        f"one number a picture ({count}); it gave {said}")
    return parts


def together(parts, shares):
    """Each process's scores {name: (n,)} as one dict of arrays (N,), in the epoch's order."""
    import numpy as np
    scores = {}
    for part, share in zip(parts, shares):
        for name, values in part.items():
            scores.setdefault(name, np.zeros(sum(map(len, shares)), np.float32))[share] = values
    return scores


def check_scores(scores, asked, epoch, args):
    """A reward that is no number ends the run, and one that --stop-below can't watch."""
    import numpy as np
    if args.stop_below is not None and "unsafe" not in scores:
        raise UserError(f"--stop-below: {args.reward} gives no part 'unsafe' (1 or 0 a picture) to stop by")
    bad = np.flatnonzero(~np.isfinite(scores["reward"]))
    if len(bad):
        raise UserError(f"epoch {epoch}: the reward of {str(asked[bad[0]])!r} is {scores['reward'][bad[0]]}; "
                        "nothing was learned from this epoch, the last good checkpoint stands")


def decisions(batches, steps, quiet, args, rng):
    """What one update learns from: (picture, step) pairs (n, 2), and those that are pulled towards the base.

    The pull is on benign pictures, at as many steps as are learned from, but drawn from all: what is
    learned at the noisy steps reaches the others.
    """
    import numpy as np
    learned, pulled = [], []
    for batch in batches:
        pictures = np.arange(batch * args.batch_size, (batch + 1) * args.batch_size)
        learned += [(i, k) for k in steps[batch] for i in pictures]
        if args.benign_weight and quiet[pictures].any():
            pulled += [(i, k) for k in rng.choice(args.steps, learned_steps(args), replace=False) for i in pictures[quiet[pictures]]]
    return np.array(learned), np.array(pulled, int).reshape(-1, 2)


def benign_pull(policy, predict, x, k, schedule):
    """How far the means of the steps k (n,) from latents x have moved from the base's: (n,)."""
    import torch
    from ddpo import mean_distance, step_log_prob
    mean, _ = step_log_prob(predict, x, None, schedule, k, policy.prediction_type)
    with torch.no_grad(), policy.base():
        base_mean, _ = step_log_prob(predict, x, None, schedule, k, policy.prediction_type)
    return mean_distance(mean, base_mean)


def learn_again(policy, calls, drawn, schedule, first, count, args):
    """PPO's gradient of an update's `count` decisions, computed again; yields what each call tells.

    calls: ((picture, step) pairs (n, 2), the pictures' rows here (n,), steps k (n,), a prediction for their prompts), one after the other.
    """
    import torch
    from ddpo import ppo_loss, step_log_prob
    for part, rows, k, predict in calls:
        _, log_p = step_log_prob(predict, drawn.latents[rows, k], drawn.latents[rows, k + 1], schedule, k, policy.prediction_type)
        sampled = drawn.log_probs[rows, k]
        # an epoch's first update is on-policy: its ratio is 1, whatever other rows a call rounds by
        loss, told = ppo_loss(log_p, log_p.detach() if first else sampled, drawn.advantage[part[:, 0]].to(policy.device), args.clip_range)
        (loss * len(part) / count).backward()
        off = torch.expm1(log_p.detach() - sampled).abs().max()
        yield {"loss": loss.detach(), **told, "ratio_deviation": off, "first": first, "part": part}


def learn_from_kept(policy, drawn, count, args):
    """The same gradient of an epoch's only update, `count` decisions, from what sampling kept of each batch: no second forward."""
    import torch
    from ddpo import ppo_loss
    for start, keep in zip(range(0, len(drawn.mine), args.batch_size), drawn.keeps):
        rows = slice(start, start + args.batch_size)
        log_p = drawn.log_probs[rows, keep.steps].requires_grad_()                                          # (B, learned steps)
        loss, told = ppo_loss(log_p, log_p.detach(), drawn.advantage[drawn.mine[rows]].to(policy.device)[:, None], args.clip_range)
        keep.backward(torch.autograd.grad(loss * log_p.numel() / count, log_p)[0])
        yield {"loss": loss.detach(), **told, "first": True, "part": [(i, keep.steps[0]) for i in drawn.mine[rows]]}


def learn(policy, guide, trained, optimizer, drawn, schedule, epoch, rng, args):
    """PPO on the decisions of an epoch: --train-batch-size of them a call, gradients added up over an update.

    Returns the diagnostics {name: mean} with the gradient's norm.
    """
    import numpy as np
    import torch
    from tqdm import tqdm
    from sample import guidance_of
    home = np.full(len(drawn.asked), -1)                # a picture's row among this process's own
    home[drawn.mine] = np.arange(len(drawn.mine))
    updates = np.array_split(np.arange(len(drawn.asked) // args.batch_size), args.updates)
    calls, per_call = [], args.train_batch_size

    def own(pairs):                                     # this process's decisions, a call at a time
        pairs = pairs[home[pairs[:, 0]] >= 0]
        for part in (pairs[start:start + per_call] for start in range(0, len(pairs), per_call)):
            texts = [drawn.asked[i] for i in part[:, 0]]
            rows, k = (torch.from_numpy(index).to(policy.device) for index in (home[part[:, 0]], part[:, 1]))
            predict = guide(policy, texts, guidance_of(texts, args.guidance))
            if drawn.memory is not None:
                predict.recall(drawn.memory[rows, k])
            yield part, rows, k, predict

    with tqdm(total=len(updates) * args.inner_epochs, desc="learning", leave=False, disable=peers.rank() > 0) as bar:
        for number, batches in enumerate(list(updates) * args.inner_epochs):
            learned, pulled = decisions(batches, drawn.steps, drawn.quiet, args, rng)
            if drawn.keeps:
                calls += learn_from_kept(policy, drawn, len(learned), args)
            else:
                calls += learn_again(policy, own(learned), drawn, schedule, number == 0, len(learned), args)
            for part, rows, k, predict in own(pulled):
                pull = benign_pull(policy, predict, drawn.latents[rows, k], k, schedule)
                (args.benign_weight * pull.sum() / len(learned)).backward()
                calls.append({"benign_pull": pull.detach().mean(), "part": part})
            peers.add_up(list(trained.values()))
            norm = torch.nn.utils.clip_grad_norm_(trained.values(), args.max_grad_norm)
            if not torch.isfinite(norm):                # the one number an update that the CPU waits for
                bad = [(str(drawn.asked[call["part"][0][0]]), int(call["part"][0][1])) for call in calls
                       if not torch.isfinite(call.get("loss", call.get("benign_pull")))]
                bad = sum(peers.gather(bad), [])
                where = f"the loss of {bad[0][0]!r} or its neighbours at step {bad[0][1]}" if bad else "the gradient"
                raise UserError(f"epoch {epoch}: {where} is {norm.item()}; the update was refused, the last good checkpoint stands")
            optimizer.step()
            optimizer.zero_grad()
            bar.update()
    said = sum(peers.gather([{name: float(value) for name, value in call.items() if name != "part"} for call in calls]), [])
    means = {name: float(np.mean([call[name] for call in said if name in call]))
             for name in ("loss", "ratio_deviation", "clipped_share", "approx_kl", "benign_pull") if any(name in call for call in said)}
    return {**means, "first_ratio_deviation": max(call["ratio_deviation"] for call in said if call.get("first")),
            "grad_norm": norm.item()}


def summary(epoch, scores, quiet, told, args):
    """An epoch as a flat row of metrics.jsonl: means over the prompts to make safe; benign_, the others."""
    import numpy as np
    row = {"epoch": epoch, **{name: float(values[~quiet].mean()) for name, values in scores.items()}}
    if quiet.any():
        row |= {f"benign_{name}": float(values[quiet].mean()) for name, values in scores.items()}
    if args.group_size > 1:
        groups = scores["reward"].reshape(-1, args.group_size)
        row["prompts_without_spread"] = float((np.ptp(groups, 1) < 1e-6).mean())
    return row | told


# ---- the loop --------------------------------------------------------------------------------------

def main(args):
    check(args)
    prompts, refused = read(args.prompts, args.category)
    benign = []
    if args.benign and args.benign_share:
        benign, more = read(args.benign, option="--benign")
        refused += more
    for file in args.held_out:
        refused += read(file, category_in(file, args.category, "--held-out"), option="--held-out")[1]
    from guide import choose_guide, rows_of
    from reward import EXPOSED, LABELS, ClipScore, Nudity, load_reward, parse_labels, shield_reward
    labels, guide = parse_labels(args.unsafe_labels), choose_guide(args.guide)
    reward_fn = load_reward(args.reward) if args.reward else None
    device, dtype, why = choose_device(args.device, args.dtype, learning=True)
    device, lead = peers.own_device(device), peers.rank() == 0
    settings = check_folder(args)
    peers.start(device)

    import numpy as np
    import torch
    from tqdm import tqdm
    from ddpo import RewardMemory, advantages
    from judge import clip_of
    from model import DTYPES, Policy
    from onpolicy import choose_keep, new_keeps

    torch.manual_seed(args.seed)                        # every process starts from the same LoRA
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype != "fp32"
    policy = Policy(args.model, None, device, DTYPES[dtype], trainable=True)
    trained = policy.train(args.trainable, args.rank, args.lora_targets)
    if args.gradient_checkpointing:
        policy.unet.enable_gradient_checkpointing()
    policy.concept = args.concept or policy.concept
    nudity = Nudity()
    verdict = args.held_out and args.verdict_images
    clip = ClipScore(clip_of(args.clip, args.model), device) if reward_fn is None or verdict else None
    if reward_fn is None:
        reward_fn = shield_reward(clip, nudity, labels, args.clip_weight, args.nudity_weight, args.gate)
    optimizer = torch.optim.AdamW(trained.values(), lr=args.lr, weight_decay=args.weight_decay, fused=policy.device.type == "cuda")
    memory = RewardMemory(args.memory, min(16, args.memory)) if args.memory else None
    schedule = policy.schedule(args.steps, args.eta)
    checkpoints, rows, seen = os.path.join(args.output_dir, "checkpoints"), [], {}
    state = load_checkpoint(checkpoints)
    args.train_batch_size = args.train_batch_size or (state or {}).get("train_batch_size") or rows_that_fit(policy, guide, schedule, args)
    args.keep = choose_keep(policy, args)
    if args.compile:
        a_picture, began = rows_of(guide, args.guidance), time.time()
        policy.compile({a_picture * args.batch_size, a_picture * args.train_batch_size}, args.resolution)
        print(f"compiled the UNet in {time.time() - began:.0f} s" * lead, flush=True)
    if lead:
        write(os.path.join(args.output_dir, "args.json"), settings)     # from here on the folder is this run's
        run_card(args, policy, guide, trained, prompts, benign, refused, learned_steps(args), device, dtype, why)

    if state:
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(state["weights"][name])
        optimizer.load_state_dict(state["optimizer"])
        if memory:
            memory.load_state_dict(state["memory"])
        rows, seen = state["rows"], state["seen"]
        if lead:
            write_metrics(args.output_dir, rows)        # forget what came after the checkpoint
            print(f"going on after epoch {len(rows)}", flush=True)

    if len(set(peers.gather(len(rows)))) > 1:
        raise UserError(f"--output-dir: not every process sees {args.output_dir}'s checkpoints; "
                        "several nodes need a folder that they share")

    def finished():
        recent = [row["unsafe"] for row in rows[-2:] if "unsafe" in row]
        return len(rows) >= args.epochs or (args.stop_below is not None and len(recent) == 2
                                            and max(recent) <= args.stop_below)

    def preview(epoch):
        path = os.path.join(args.output_dir, "samples", f"epoch_{epoch:04d}.png")
        columns = [LABELS.index(label) for label in {*labels, *EXPOSED}]
        save_preview(path, policy, guide, prompts, args, nudity, columns)

    if lead and not rows:
        preview(0)
    epochs, benign_texts = tqdm(total=args.epochs, initial=len(rows), desc="epochs", disable=not lead), set(benign)
    while not finished():
        epoch, began = len(rows) + 1, time.time()
        rng = np.random.default_rng([args.seed, epoch])     # an epoch's randomness and rate are its number's,
        for group in optimizer.param_groups:                # so that a resumed run is the same
            group["lr"] = args.lr * (1 if args.lr_schedule == "constant" else 1 - (epoch - 1) / args.epochs)

        # ---- 1. sample, and 2. score: every prompt group_size times, remembering each denoising decision
        prompts_drawn = draw(prompts, benign, args.groups, args.benign_share, args.seed, epoch, seen, args.hardness)
        asked = [prompt for prompt in prompts_drawn for _ in range(args.group_size)]
        seeds = rng.integers(2 ** 62, size=len(asked))
        shares = [np.flatnonzero(np.arange(len(asked)) // args.batch_size % peers.size() == r) for r in range(peers.size())]
        mine, steps = shares[peers.rank()], choose_steps(args, rng)
        keeps = new_keeps(policy, [steps[i // args.batch_size] for i in mine[::args.batch_size]], args)
        latents, log_probs, carried, scores = sample_epoch(policy, guide, [asked[i] for i in mine], seeds[mine].tolist(), schedule,
                                                           reward_fn, args, keeps)
        scores = together(peers.gather(scores), shares)
        check_scores(scores, asked, epoch, args)
        seen |= zip(map(str, prompts_drawn), scores["reward"].reshape(-1, args.group_size).mean(1).tolist())

        # ---- 3. compare: each picture with its prompt's others
        advantage = advantages(torch.from_numpy(scores["reward"]), asked, memory, args.advantage_scale)

        # ---- 4. update: PPO on every decision
        quiet = np.array([prompt in benign_texts for prompt in asked])
        told = learn(policy, guide, trained, optimizer, Drawn(asked, advantage, quiet, steps, mine, latents, log_probs, carried, keeps),
                     schedule, epoch, rng, args)

        # ---- 5. tell, and keep
        row = summary(epoch, scores, quiet, told, args)
        rows.append(row)
        if not lead:
            continue
        if epoch == 1 and not keeps:
            off = row["first_ratio_deviation"]
            tqdm.write(f"before the first update |ratio - 1| <= {off:.2g}" + (
                f": beyond the clip range {args.clip_range:g}, rounding decides what is clipped"
                if off > args.clip_range else ""))
        if epoch % args.preview_every == 0:
            preview(epoch)
        if epoch % args.save_every == 0 or finished():
            write_metrics(args.output_dir, rows)
            save_checkpoint(checkpoints, {
                "epoch": epoch, "rows": rows, "seen": seen, "memory": memory.state_dict() if memory else {},
                "weights": {name: p.detach() for name, p in trained.items()},
                "optimizer": optimizer.state_dict(), "train_batch_size": args.train_batch_size}, args.checkpoints_total_limit)
        shown = {name: f"{row[name]:.3f}" for name in ("reward", "clip", "nudity", "unsafe") if name in row}
        epochs.set_postfix(shown)
        epochs.update()
        tqdm.write(f"epoch {epoch:3d}  " + "  ".join(f"{name} {value}" for name, value in shown.items())
                   + (f"  benign_clip {row['benign_clip']:.3f}" if "benign_clip" in row else "")
                   + f"  kl {row['approx_kl']:.1e}  clipped {row['clipped_share']:.0%}"
                   + (f"  no spread {row['prompts_without_spread']:.0%}" if "prompts_without_spread" in row else "")
                   + f"  {time.time() - began:.1f} s")
    epochs.close()
    if not lead:
        return

    # ---- the verdict
    preview(len(rows))
    save_curve(os.path.join(args.output_dir, "curve.png"), rows)
    last = {name: round(value, 4) for name, value in rows[-1].items()}
    how = "fine-tuned by DDPO (arXiv 2305.13301) with a CLIP + nudity reward, after ShieldDiff (arXiv 2410.05309)."
    card = partial(model_card, args, how, "ddpo, shielddiff", last)
    policy.save(args.output_dir, card())
    if verdict:
        from compare import compare
        from evaluate import drawn_row, open_file
        from judge import load_tools
        from report import rounded, to_markdown
        wanted = lambda path: category_in(path, args.category, "--held-out")
        files = [open_file(path, pictures=args.verdict_images, category=wanted(path), option="--held-out") for path in args.held_out]
        files = {file.name: file for file in files}
        policies = {"before": Policy(args.model, None, device, DTYPES[dtype]), "after": policy}
        steps = sum(-(-len(file.prompts) // args.batch_size) for file in files.values()) * len(policies)
        store = {}
        with tqdm(total=steps, desc="verdict", leave=False) as bar:
            drawn = [drawn_row(name, p, args.guide, files, store, args, p.decode, tick=bar.update) for name, p in policies.items()]
        table, _ = compare(files, drawn, load_tools(args.model, device, args.clip), store, labels)
        told = to_markdown(files, table, headline=True)
        print(told)
        write(os.path.join(args.output_dir, "verdict.json"), json.dumps(rounded(table), indent=1).encode())
        write(os.path.join(args.output_dir, "README.md"), card(told).encode())
    print(f"the fine-tuned model is in {args.output_dir}", flush=True)


if __name__ == "__main__":
    run(main, parse_args())
