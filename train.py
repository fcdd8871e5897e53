"""Make a text-to-image model stop drawing nudity, by reinforcement learning (DDPO).

    python train.py                                     # the embedded world, minutes on a laptop
    python train.py --model CompVis/stable-diffusion-v1-4 --prompts i2p.csv --category sexual \
        --benign coco.csv --output-dir out/sd14         # Stable Diffusion, with its own settings
    torchrun --nproc-per-node 2 train.py --output-dir out/two

After ShieldDiff (arXiv 2410.05309). Each epoch: sample pictures, score them, compare each with its
prompt's others, update the policy by PPO on the denoising steps, with benign pictures pulled
towards the base's. Ends with a before/after table on held-out prompts. The same command resumes
where it was cut off, to the same result. Writes into --output-dir: args.json, metrics.jsonl,
curve.png, samples/, checkpoints/, the LoRA in diffusers' and kohya's formats, README.md (a model
card), verdict.json; and best/, the LoRA that looked best on validation prompts while training.

Settings are those of the model's recipe (recipes/NAME.json); options override them.
"""
import os
import time
from argparse import BooleanOptionalAction
from contextlib import nullcontext
from functools import partial

from plumbing import checkpoints, processes, watch
from plumbing.idle import refuse_idle
from plumbing.kinds import at_least, positive, share_above_0, share_below_1
from plumbing.options import Parser, add_options, learned_steps, run
from plumbing.worlds import DEFAULT_MODEL, parse_with_recipe, read_world


def parse_args(argv=None):
    p = Parser("Fine-tune a text-to-image model by DDPO with a CLIP + nudity reward.")
    g = p.add_argument_group("what is trained, on what")
    g.add_argument("--model", default=DEFAULT_MODEL, help="folder or hub id of the base model")
    g.add_argument("--recipe", default=None,
                   help="settings: embedded, stable_diffusion, reference (ddpo-pytorch's), elbo "
                        "(AWM's objective), or a .json file; the model's own if left out")
    g.add_argument("--prompts", nargs="+", default=None,
                   help="files or texts: what has to become safe; the model's own if left out")
    g.add_argument("--benign", nargs="+", default=None,
                   help="files or texts: what has to stay; those that belong to --prompts")
    add_options(g, "--category")
    g.add_argument("--held-out", nargs="*", default=None,
                   help="prompt files judged after training; if left out, those that belong to "
                        "--prompts, or a tenth of the prompts, kept back; without a value: none")
    g.add_argument("--rank", type=at_least(1), help="rank of the LoRA")
    g.add_argument("--lora-targets", choices=["attention", "all"],
                   help="attention alone, or convolutions and feed-forward layers too")
    g = p.add_argument_group("reward")
    g.add_argument("--reward", default=None,
                   help="my_file.py:my_function instead of CLIP + nudity")
    g.add_argument("--clip-weight", type=at_least(0, float),
                   help="weight of the CLIP cosine; the worst unsafe label's score has weight 1")
    add_options(g, "--unsafe-labels")
    g = p.add_argument_group("sampling")
    add_options(g, "--steps", "--guidance")
    g.add_argument("--groups", type=at_least(1), help="prompts per epoch")
    g.add_argument("--group-size", type=at_least(1), help="pictures per prompt")
    g.add_argument("--batch-size", type=at_least(1), help="pictures at once (per process)")
    g.add_argument("--hardness", type=at_least(0, float),
                   help="how strongly prompts are preferred whose last rewards were low; 0: all "
                        "come equally often")
    g.add_argument("--benign-share", type=share_below_1,
                   help="share of an epoch's pictures that are of benign prompts, each another")
    g = p.add_argument_group("learning")
    g.add_argument("--epochs", type=at_least(1), help="epochs in all")
    g.add_argument("--lr", type=positive, help="learning rate of AdamW")
    g.add_argument("--lr-schedule", choices=["linear", "quadratic", "constant"],
                   help="linear, quadratic: falls to 0 at the end of --epochs, quadratic sooner")
    g.add_argument("--clip-range", type=positive,
                   help="PPO's, on the ratio of mean log-probabilities: what suits a latent of D "
                        "numbers scales with 1/D (1e-4 for Stable Diffusion)")
    g.add_argument("--updates", type=at_least(1), help="updates per epoch")
    g.add_argument("--timestep-fraction", type=share_above_0,
                   help="share of the steps that is learned from, the noisiest ones")
    g.add_argument("--decision", choices=["drawn", "expected"],
                   help="what PPO takes a step to have decided: the latent that it drew (DDPO), or "
                        "that latent's expectation, given the finished picture: less noise")
    g.add_argument("--loss", choices=["ddpo", "elbo"],
                   help="PPO on the steps that drew the pictures (DDPO), or on steps begun anew "
                        "from them (after AWM)")
    g.add_argument("--advantage", choices=["batch", "prompt", "memory"],
                   help="batch, prompt: subtract the prompt's mean, divide by the standard "
                        "deviation of the batch, or of the prompt; memory: mean and deviation of "
                        "the prompt's last 32 rewards (DDPO)")
    g.add_argument("--benign-weight", type=at_least(0, float),
                   help="how strongly benign pictures are pulled towards the base's")
    g.add_argument("--safe-text-weight", type=at_least(0, float),
                   help="how strongly pictures of a prompt that has a safe_text are pulled towards "
                        "what the model draws of that, at the steps that are learned from")
    g.add_argument("--base-weight", type=at_least(0, float),
                   help="pull towards the base's of half of the other safe pictures, at late steps")
    g.add_argument("--compile", action="store_true",
                   help="torch.compile the UNet: minutes at first, then faster on a GPU")
    g.add_argument("--gradient-checkpointing", action=BooleanOptionalAction,
                   help="less memory, a third more time")
    g = p.add_argument_group("output")
    g.add_argument("--output-dir", default="out/shield",
                   help="folder of the run; the same command resumes there")
    g.add_argument("--save-every", type=at_least(1), default=10,
                   help="epochs between checkpoints, each with a look at 64 validation pictures")
    add_options(g, "--device", "--dtype", "--seed")
    args = parse_with_recipe(p, argv, lambda args: (read_world(args.model).recipe, {}))
    return refuse_idle(p, argv, "train", args)


if __name__ == "__main__":              # before the heavy imports, so that --help is quick
    ARGS = parse_args()

import numpy as np
import torch
from tqdm import tqdm

from ddpo import (
    RewardMemory,
    advantages,
    decisions,
    draw_noise,
    draw_steps,
    log_prob,
    mean_distance,
    pairs,
    ppo_loss,
    renoise,
    rollout,
    step_mean,
)
from judging.judges import load_tools
from judging.verdict import judge_run
from model import Policy, guidance_of, plain
from plumbing.cards import epoch_line, gather_records, model_card, run_card, summary
from plumbing.devices import DTYPES, choose_device, copy_to_cpu, scoring_thread
from plumbing.files import write
from plumbing.plots import save_curve
from plumbing.training_prompts import training_prompts
from plumbing.user_reward import load_reward, score
from prompts import check_epoch, draw
from reward import ClipScore, Nudity, parse_labels, shield_reward
from sample import check_texts

DESCRIPTION = ("fine-tuned by DDPO (arXiv 2305.13301) with a CLIP + nudity reward, after "
               "ShieldDiff (arXiv 2410.05309).")
WEIGHT_DECAY = 1e-4
MAX_GRAD_NORM = 1.
LR_POWERS = {"constant": 0, "linear": 1, "quadratic": 2}
ELBO_DRAWS, ELBO_SPREAD = 2, .05        # of --loss elbo: noise per learned step, least spread


# ---- the pulls -----------------------------------------------------------------------------------

def pulls_of(args, D, is_benign, has_safe_text, scores):
    """Whose steps are pulled to what a teacher makes of them, and how strongly.

    An epoch's N pictures have D + 2 columns: the D decisions that PPO learns from, then a step
    among the learned ones and a later one (draw_steps). Benign pictures are pulled to the base's
    at these two; half of the others that were not found unsafe at the later one; those that have a
    safe_text, at their decisions, to what the policy itself makes of that.
    is_benign, has_safe_text: (N,) bool; scores: of the others, which come first.
    Returns {name: (whose (N,) bool, which columns, weight)}.
    """
    in_first_half = np.arange(len(is_benign)) % args.group_size < args.group_size / 2
    is_safe = ~is_benign & ~has_safe_text & in_first_half
    is_safe[~is_benign] &= scores.get("unsafe", 0 * scores["reward"]) == 0
    return {"benign_pull": (is_benign, slice(D, None), args.benign_weight),
            "safe_text_pull": (has_safe_text, slice(D), args.safe_text_weight / D),
            "base_pull": (is_safe, slice(D + 1, None), args.base_weight)}


# ---- the loop ------------------------------------------------------------------------------------

def main(args, clock=lambda stage: None):
    """Train. clock(stage) is called after each stage of an epoch, for benchmarks."""
    labels = parse_labels(args.unsafe_labels)
    reward_fn = load_reward(args.reward) if args.reward else None
    device, dtype, why = choose_device(args.device, args.dtype, learning=True)
    device = processes.own_device(device)
    data = training_prompts(args)
    check_epoch(args, data, processes.size())
    settings = checkpoints.check_folder(args)
    processes.start(device)
    is_lead = processes.is_lead()

    torch.manual_seed(args.seed)                        # every process starts from the same LoRA
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype != "fp32"
    policy = Policy(args.model, (), device, DTYPES[dtype], trainable=True)
    trained = policy.make_trainable("lora", args.rank, args.lora_targets)
    if args.gradient_checkpointing:
        policy.unet.enable_gradient_checkpointing()
    nudity = Nudity(device=device)
    if reward_fn is None:
        clip = ClipScore(policy.world.clip, device, policy.world.clip_option)
        reward_fn = shield_reward(clip, nudity, labels, args.clip_weight)
    tools = load_tools(policy.world, device) if is_lead and watch.is_counted(args, data) else None
    optimizer = torch.optim.AdamW(trained.values(), lr=args.lr, weight_decay=WEIGHT_DECAY,
                                  fused=policy.device.type == "cuda")
    memory = RewardMemory(size=32, min_count=16) if args.advantage == "memory" else None
    schedule = policy.schedule(args.steps)
    learned = torch.arange(learned_steps(args), device=policy.device)       # the noisiest steps
    if args.loss == "elbo":
        learned = learned.repeat_interleave(ELBO_DRAWS)
    D = len(learned)                                    # of a picture's decisions, PPO looks at D
    fresh = D if args.loss == "elbo" else 0             # and so many begin anew from the picture
    batches = partial(pairs, size=args.batch_size, device=policy.device)
    pictures_per_epoch = args.groups * args.group_size
    local = processes.local_share(pictures_per_epoch)                       # (n,) our pictures
    if args.compile:
        rows = args.batch_size * (1 if args.guidance == 1 else 2)
        policy.compile(rows, with_base=args.benign_weight + args.base_weight > 0)
    if is_lead:
        check_texts(policy, data.prompts)
        check_texts(policy, data.benign, "--benign")
        check_texts(policy, data.judged, "--held-out")
        data.write_kept_back()
        write(os.path.join(args.output_dir, "args.json"), settings)     # the folder is this run's
        run_card(args, policy, trained, data, (device, dtype, why))

    folder = os.path.join(args.output_dir, "checkpoints")
    metrics, last_rewards = [], {}
    state = checkpoints.load_everywhere(folder)
    if state:
        checkpoints.restore(trained, state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        if memory:
            memory.load_state_dict(state["memory"])
        metrics, last_rewards = state["metrics"], state["last_rewards"]
        if is_lead:
            checkpoints.write_metrics(args.output_dir, metrics)     # forget what came after it
            print(f"resuming after epoch {metrics[-1]['epoch']}", flush=True)

    def step(x, k, asked, own):
        """Mean and sigma of steps k (b,) from x, for the texts `asked` at the guidance of `own`."""
        predict = plain(policy, asked, guidance_of(own, args.guidance))
        return step_mean(predict, x, schedule, k, policy.prediction_type)

    def card(metrics, verdict=""):
        last = {name: round(value, 4) for name, value in metrics[-1].items()}
        return model_card(args, DESCRIPTION, "ddpo, shielddiff", last, verdict)

    def score_batch(pictures, texts):
        return score(reward_fn, pictures(), texts, args.reward)

    def look(row):
        """Add to a row of metrics what is watched now, in every process."""
        seen = {}
        if is_lead:
            seen = watch.look(policy, data.watched, nudity, tools, labels, args, row["epoch"])
        row |= processes.gather(seen)[0]

    if not metrics:
        metrics.append({"epoch": 0})                    # the base's
        look(metrics[0])
    bar = partial(tqdm, total=-(-len(local) // args.batch_size) * args.steps, leave=False,
                  disable=not is_lead)

    for epoch in range(metrics[-1]["epoch"] + 1, args.epochs + 1):
        if watch.fall(metrics):                         # the model comes apart
            break
        began = time.time()
        rng = np.random.default_rng([args.seed, epoch])     # rng and rate depend on the epoch's
        left = 1 - (epoch - 1) / args.epochs                # number alone: a resumed run is equal
        for group in optimizer.param_groups:
            group["lr"] = args.lr * left ** LR_POWERS[args.lr_schedule]

        # ---- 1. sample, 2. score: each prompt group_size times, remembering every decision
        texts, is_benign = draw(data.prompts, data.benign, args.groups, args.group_size,
                                args.benign_share, args.seed, epoch, last_rewards,
                                args.hardness)                                          # (N,)
        safe_texts = np.array([p.safe_text for p in texts], dtype=object)               # (N,)
        has_safe_text = (texts != safe_texts) & ~is_benign                              # (N,)
        seeds = rng.integers(2 ** 62, size=len(texts))                                  # (N,)
        pull_steps = draw_steps(rng, learned_steps(args), args.steps, len(texts))[local]
        pull_steps = torch.from_numpy(pull_steps).to(policy.device)                     # (n, 2)
        drawn, scores = [], []
        with scoring_thread(policy.device) as scorer, bar(desc=f"epoch {epoch}") as ticks:
            for start in range(0, len(local), args.batch_size):
                batch = local[start:start + args.batch_size]
                noise = draw_noise(seeds[batch], args.steps + fresh, policy.latent_shape())
                noise = noise.to(policy.device, non_blocking=True)  # (b, T + 1 + fresh, C, h, w)
                predict = plain(policy, texts[batch], guidance_of(texts[batch], args.guidance))
                path, log_probs = rollout(predict, noise, schedule, policy.prediction_type,
                                          args.decision, ticks.update)
                decided = []
                if fresh:
                    begun, *decided, log_probs = renoise(predict, path[:, -1], noise[:, -D:],
                                                         schedule, learned, policy.prediction_type)
                    path = torch.cat([begun, path], 1)
                drawn.append((path, log_probs[:, :D], *decided))
                clock("sample")
                rewarded = list(texts[batch[~is_benign[batch]]])        # which come first
                if rewarded:
                    pictures = copy_to_cpu(policy.decode(path[:len(rewarded), -1]))
                    clock("decode")
                    scores.append(scorer.submit(score_batch, pictures, rewarded))
                    clock("score")
            scores = [future.result() for future in scores]
        scores = processes.gather_scores(scores)                            # {name: (R,)}
        # latents (n, fresh + T + 1, C, h, w), of which D steps begin at the first D; their log p
        # (n, D); what each has decided, as a latent
        latents, old_log_probs, *decided = map(torch.cat, zip(*drawn, strict=True))
        decided = decided[0] if fresh else decisions(latents, schedule, args.decision)
        drawn.clear()                                   # what it holds is copied by now
        group_means = scores["reward"].reshape(-1, args.group_size).mean(1).tolist()
        prompts = [p.key for p in texts[~is_benign]]                                    # (R,)
        last_rewards |= dict(zip(prompts[::args.group_size], group_means, strict=True))

        # ---- 3. compare: each picture with its prompt's others; benign ones are not rewarded
        scale = "batch" if args.advantage == "batch" else "prompt"
        advantage = advantages(torch.from_numpy(scores["reward"]), prompts, memory, scale,
                               ELBO_SPREAD if args.loss == "elbo" else 0.)                  # (R,)
        advantage = advantage[local[~is_benign[local]]].to(policy.device)                   # (r,)

        # ---- 4. update. Of each picture D + 2 steps are learned from: the D decisions, by PPO, and
        # two of pull_steps; some of them are pulled to the mean that a teacher makes of the step
        k = torch.cat([learned.expand(len(local), D), pull_steps], 1)       # (n, D + 2)
        at_latent = torch.cat([torch.arange(D).to(k).expand(len(local), D), pull_steps + fresh], 1)
        pulls = pulls_of(args, D, is_benign, has_safe_text, scores)
        weight = np.zeros(k.shape, np.float32)                              # (n, D + 2)
        for whose, columns, its_weight in pulls.values():
            weight[whose[local], columns] = its_weight
        pulled = weight > 0
        aims = latents.new_zeros(pulled.sum() + 1, *policy.latent_shape())  # the first of no pull
        number = torch.from_numpy(pulled.cumsum().reshape(k.shape) * pulled).to(policy.device)
        for teacher, taught, aim_texts in ((policy.base, ~has_safe_text, texts),
                                           (nullcontext, has_safe_text, safe_texts)):
            with torch.no_grad(), teacher():
                for i, _, at in batches(pulled & taught[local, None]):
                    x = latents[at[0], at_latent[at]]
                    aims[number[at]], _ = step(x, k[at], aim_texts[local[i]], texts[local[i]])
        is_learned = pulled.copy()
        is_learned[~is_benign[local], :D] = True
        weight = torch.from_numpy(weight).to(policy.device)
        distance = torch.zeros_like(weight)                                 # from the aims
        records = []
        of_update = pictures_per_epoch // args.updates              # pictures, of all processes
        for update in range(args.updates):
            rows = np.arange(len(local)) // (len(local) // args.updates) == update      # (n,)
            for i, columns, at in batches(is_learned & rows[:, None]):
                texts_of = texts[local[i]]
                mean, sigma = step(latents[at[0], at_latent[at]], k[at], texts_of, texts_of)
                pull = mean_distance(mean, aims[number[at]])                            # (b,)
                loss = (weight[at] * pull).sum() / of_update
                distance[at] = pull.detach()
                record = {"where": (str(texts_of[0]), k[at][0])}
                m = (columns < D).sum()                 # the decisions come first
                if m:
                    decision = at[0][:m], at[1][:m]
                    log_p = log_prob(decided[decision], mean[:m], sigma[:m])            # (m,)
                    # the first update is on-policy: the ratio is 1 exactly, although another batch
                    # shape than sampling's may round otherwise
                    old = log_p.detach() if update == 0 else old_log_probs[decision]
                    ppo, diagnostics = ppo_loss(log_p, old, advantage[decision[0]], args.clip_range)
                    loss = loss + ppo * m / (of_update * D)
                    drift = torch.expm1(log_p.detach() - old_log_probs[decision]).abs().max()
                    record |= {"loss": ppo.detach(), **diagnostics, "ratio_deviation": drift,
                               "update": update, "rows": m}
                loss.backward()
                records.append(record | {"total": loss.detach()})

            processes.sum_gradients(trained.values())
            norm = torch.nn.utils.clip_grad_norm_(trained.values(), MAX_GRAD_NORM)
            watch.check_gradient(norm, records, epoch)  # here the CPU waits for the GPU
            optimizer.step()
            optimizer.zero_grad()
        clock("update")

        # ---- 5. tell: a line, metrics, and now and then a grid of pictures and a checkpoint
        records = gather_records(records, pulls, distance, local)
        metrics.append(summary(epoch, scores, records, norm, args))
        if is_lead:
            tqdm.write(epoch_line(metrics[-1], time.time() - began))
        is_saved = epoch % args.save_every == 0 or epoch == args.epochs
        if is_saved:
            look(metrics[-1])
        if is_saved and is_lead:
            checkpoints.write_metrics(args.output_dir, metrics)
            save_curve(os.path.join(args.output_dir, "curve.png"), metrics)
            if watch.best(metrics) == epoch:
                policy.save(os.path.join(args.output_dir, "best"), card(metrics))
            checkpoints.save_checkpoint(folder, {
                "epoch": epoch, "metrics": metrics, "last_rewards": last_rewards,
                "memory": memory.state_dict() if memory else {},
                "weights": checkpoints.copy_of(trained), "optimizer": optimizer.state_dict(),
            }, limit=None)
        clock("tell")
    if not is_lead:
        return

    watch.end_if_fallen(args, policy, trained, metrics, partial(card, metrics))
    policy.save(args.output_dir, card(metrics))
    watch.say_what_was_missed(metrics)
    if data.held_out:
        judge_run(policy, tools, data.held_out, labels, args, partial(card, metrics))
    print(f"the fine-tuned model is in {args.output_dir}", flush=True)


if __name__ == "__main__":
    run(main, ARGS)
