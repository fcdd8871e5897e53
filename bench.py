"""How fast an epoch is, against the machine's floor and TRL's trainer; and how soon a run is safe.

    python bench.py                                        # the default epoch of the tiny world, here
    python bench.py --steps 10 --timestep-fraction 1       # any option of train.py's
    python bench.py --against ../trl/bin/python            # the same work by trl==0.23.1 in that environment
    python bench.py --to-target out/reference out/shield   # runs that kept all checkpoints (--checkpoints-total-limit 99)
    python bench.py --gpu-report                           # Stable Diffusion 1.5 in full size, on a GPU

The floor is the UNet's FLOPs over the matrix rate this machine reaches in the dtype used: an epoch can't be
faster than it without doing less. Appends what it printed to results/bench.md.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import time

from prompts import UserError
from sample import read_args, run

REWARD = "redness: a cheap stand-in, the same on both sides"


def redness(pictures, prompts):
    import numpy as np
    red = np.asarray(pictures, np.float32).mean((1, 2)) / 255
    return {"reward": red[:, 0] - red[:, 1:].mean(1)}


# ---- ours --------------------------------------------------------------------------------------------

class Epoch:
    """One epoch's work as train.py does it, cut where a clock can stand between its stages."""

    def __init__(self, args, reward_fn=None):
        import numpy as np
        import torch
        from guide import choose_guide, rows_of
        from judge import clip_of
        from model import DTYPES, Policy
        from onpolicy import choose_keep
        from prompts import draw, read
        from reward import LABELS, ClipScore, Nudity, load_reward, parse_labels, shield_reward
        from sample import choose_device
        from train import check, rows_that_fit
        check(args)
        self.args, (self.device, self.dtype, _) = args, choose_device(args.device, args.dtype, learning=True)
        torch.manual_seed(0)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.dtype != "fp32"
        self.policy = Policy(args.model, None, self.device, DTYPES[self.dtype], trainable=True)
        self.trained = self.policy.train(args.trainable, args.rank, args.lora_targets)
        self.policy.concept = args.concept or self.policy.concept
        if args.gradient_checkpointing:
            self.policy.unet.enable_gradient_checkpointing()
        self.guide, self.schedule = choose_guide(args.guide), self.policy.schedule(args.steps, args.eta)
        args.train_batch_size = args.train_batch_size or rows_that_fit(self.policy, self.guide, self.schedule, args)
        args.keep = choose_keep(self.policy, args)
        if args.compile:
            began, a_picture = time.time(), rows_of(self.guide, args.guidance)
            self.policy.compile({a_picture * args.batch_size, a_picture * args.train_batch_size}, args.resolution)
            print(f"compiled in {time.time() - began:.0f} s")
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=1e-9, fused=self.device.startswith("cuda"))
        labels = parse_labels(args.unsafe_labels)
        if reward_fn is None and args.reward:
            reward_fn = load_reward(args.reward)
        elif reward_fn is None:
            self.clip, self.nudity, self.columns = ClipScore(clip_of(args.clip, args.model), self.device), Nudity(), [LABELS.index(label) for label in labels]
            reward_fn = shield_reward(self.clip, self.nudity, labels)
        self.reward_fn = reward_fn
        benign = read(args.benign, option="--benign")[0] if args.benign else []
        prompts = draw(read(args.prompts, args.category)[0], benign, args.groups, args.benign_share, 0, 1)
        self.asked = [prompt for prompt in prompts for _ in range(args.group_size)]
        self.quiet = np.array([prompt in set(benign) for prompt in self.asked])

    def wait(self):
        import torch
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    def run(self):
        """Seconds to sample, to decode, to score (CLIP, NudeNet), to update; and with scoring beside sampling, if it can."""
        import numpy as np
        import torch
        from ddpo import advantages
        from onpolicy import new_keeps
        from sample import rollouts
        from train import Drawn, choose_steps, learn, sample_epoch
        rng = np.random.default_rng(0)
        began, steps = self.wait(), choose_steps(self.args, rng)
        keeps = new_keeps(self.policy, steps, self.args)
        batches = list(rollouts(self.policy, self.guide, self.asked, range(len(self.asked)), self.schedule, self.args.guidance,
                                self.args.batch_size, self.args.resolution, keeps=keeps))
        sampled = self.wait()
        pictures = torch.cat([self.policy.decode(latents[:, -1]).cpu() for _, _, latents, _ in batches]).numpy()
        decoded = self.wait()
        scores = self.reward_fn(pictures, self.asked)
        scored = self.wait()
        latents, log_probs = (torch.cat([batch[i] for batch in batches]) for i in (2, 3))
        advantage = advantages(torch.as_tensor(scores["reward"]), self.asked, None, self.args.advantage_scale)
        learn(self.policy, self.guide, self.trained, self.optimizer, Drawn(self.asked, advantage, self.quiet, steps,
              np.arange(len(self.asked)), latents, log_probs, None, keeps), self.schedule, 1, rng, self.args)
        told = {"sample": sampled - began, "decode": decoded - sampled, "score": scored - decoded, "update": self.wait() - scored}
        if self.device.startswith("cuda"):
            began = self.wait()
            sample_epoch(self.policy, self.guide, self.asked, list(range(len(self.asked))), self.schedule, self.reward_fn, self.args,
                         new_keeps(self.policy, steps, self.args))
            told["sample and score"] = self.wait() - began
        return told

    def flops(self):
        """The UNet's FLOPs of an epoch, counted on calls of two rows: {"sample", "update"}."""
        import torch
        from torch.utils.flop_counter import FlopCounterMode
        from train import choose_steps, decisions
        import numpy as np
        x = torch.zeros(2, *self.policy.latent_shape(self.args.resolution), device=self.device)
        predict = self.guide(self.policy, ["a", "a"], self.args.guidance)
        compiled, self.policy.compiled = self.policy.compiled, {}

        def per_picture(work):
            with FlopCounterMode(display=False) as counter:
                work()
            return counter.get_total_flops() / 2
        with torch.no_grad():
            forward = per_picture(lambda: predict(x, self.schedule.t[0]))
        both = per_picture(lambda: predict(x, self.schedule.t[0]).sum().backward())
        self.policy.unet.zero_grad()
        self.policy.compiled = compiled
        rng, args = np.random.default_rng(0), self.args
        learned, pulled = decisions(range(len(self.asked) // args.batch_size), choose_steps(args, rng), self.quiet, args, rng)
        told = {"sample": forward * len(self.asked) * args.steps,
                "update": args.inner_epochs * (both * (len(learned) + len(pulled)) + forward * len(pulled))}
        if args.keep != "nothing":                      # no second forward, and with gradients the backward is sampling's
            told["update"] -= forward * len(learned)
        if args.keep == "gradients":
            told["update"] -= (both - forward) * len(learned)
            told["sample"] += (both - forward) * len(learned)
        return told


def whole_epoch(seconds):
    """An epoch's seconds from those of its stages: where scoring can stand beside sampling, it does."""
    return seconds.get("sample and score", seconds["sample"] + seconds["decode"] + seconds["score"]) + seconds["update"]


def matrix_rate(device, dtype):
    """FLOP/s of square matrix products in this dtype: the best of many, of a size that fills the machine."""
    import torch
    size = 8192 if device.startswith("cuda") else 2048
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    best = 0
    for _ in range(12):
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        began = time.perf_counter()
        a @ b
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        best = max(best, 2 * size ** 3 / (time.perf_counter() - began))
    return best


def report(args, repeats):
    """Median seconds of each stage over `repeats` epochs, after one that warms up, against the floor."""
    import statistics
    import torch
    epoch = Epoch(args)
    epoch.run()
    if epoch.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    runs = [epoch.run() for _ in range(repeats)]
    seconds = {stage: statistics.median(run[stage] for run in runs) for stage in runs[0]}
    rate, flops = matrix_rate(epoch.device, epoch.dtype), epoch.flops()
    floor = sum(flops.values()) / rate
    whole = whole_epoch(seconds)
    unet = seconds["sample"] + seconds["update"]
    if epoch.device.startswith("cuda"):
        memory = f"{torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB of the GPU's"
    else:
        memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20:.1f} GiB"
    score = max(0, whole - unet - seconds["decode"]) if "sample and score" in seconds else seconds["score"]
    return "\n".join([
        f"{len(epoch.asked)} pictures, {args.steps} steps, guidance {args.guidance:g}, batch {args.batch_size}, {args.train_batch_size} picture-timesteps a "
        f"learning call, LoRA rank {args.rank} on {args.lora_targets}, {epoch.dtype}, --keep {args.keep}; median of {repeats} epochs",
        "", "| stage | seconds | UNet TFLOP | floor, seconds | measured / floor |", "|---|---|---|---|---|",
        *(f"| {stage} | {seconds[stage]:.2f} | {flops[stage] / 1e12:.2f} | {flops[stage] / rate:.2f} | {seconds[stage] * rate / flops[stage]:.2f} |"
          for stage in ("sample", "update") if flops[stage]),
        f"| decode | {seconds['decode']:.2f} | | | |", f"| score (CLIP, NudeNet) | {seconds['score']:.2f} | | | |",
        f"| epoch | {whole:.2f} | {sum(flops.values()) / 1e12:.2f} | {floor:.2f} | {whole / floor:.2f} |", "",
        f"{len(epoch.asked) / whole:.2f} pictures a second; scoring takes {score / whole:.0%} of the epoch; matrix rate {rate / 1e12:.2f} TFLOP/s; "
        f"peak memory {memory}"])


# ---- theirs ------------------------------------------------------------------------------------------

def serve_trl(model, batch, steps, guidance, dtype):
    """Runs in TRL's environment: an epoch of its DDPOTrainer for every line on stdin, its seconds on stdout."""
    import logging
    logging.disable(logging.WARNING)
    from accelerate import PartialState
    PartialState()                                      # TRL's LoRA pipeline dies without
    import torch
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline
    torch.manual_seed(0)
    prompts = iter(lambda: "a large peach on a blue background", None)
    config = DDPOConfig(num_epochs=1, sample_num_steps=steps, sample_batch_size=batch, sample_num_batches_per_epoch=1, train_batch_size=batch,
                        train_gradient_accumulation_steps=1, train_num_inner_epochs=1, sample_guidance_scale=guidance, train_cfg=guidance != 1,
                        mixed_precision={"fp32": "no", "bf16": "bf16"}[dtype], save_freq=10 ** 9, num_checkpoint_limit=1, log_with=None,
                        project_kwargs={"project_dir": "/tmp/trl_bench", "automatic_checkpoint_naming": True})

    def reward(pictures, prompts, metadata):
        red = pictures.float().mean((2, 3))
        return red[:, 0] - red[:, 1:].mean(1), {}
    trainer = DDPOTrainer(config, reward, lambda: (next(prompts), {}), DefaultDDPOStableDiffusionPipeline(model, use_lora=True))
    step = 0
    print("ready", flush=True)
    for epoch, _ in enumerate(sys.stdin):
        began = time.perf_counter()
        step = trainer.step(0, step)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        print(json.dumps(time.perf_counter() - began), flush=True)


def against(python, args, repeats):
    """Our epoch and TRL's in turn: the same folder, LoRA (its rank 4 on attention), batch, steps, guidance, dtype, reward."""
    import statistics
    from sample import choose_device
    dtype = choose_device(args.device, args.dtype, learning=True)[1]
    epoch = Epoch(args, redness)
    command = [os.path.abspath(python), os.path.abspath(__file__), "--serve-trl", os.path.abspath(args.model), str(args.batch_size), str(args.steps), str(args.guidance), dtype]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/tmp") as theirs:
        def answer():
            for line in theirs.stdout:                  # trackers may write there too
                if line.strip() == "ready":
                    return 0.
                try:
                    return float(line)
                except ValueError:
                    continue
            raise UserError(f"--against: {python} ended; it needs trl==0.23.1")
        answer()
        ours_seconds, their_seconds = [], []
        for turn in range(repeats + 1):
            theirs.stdin.write("go\n")
            theirs.stdin.flush()
            their_seconds.append(answer())
            began = time.perf_counter()
            epoch.run()
            ours_seconds.append(time.perf_counter() - began)
        theirs.stdin.close()
    ours, other = statistics.median(ours_seconds[1:]), statistics.median(their_seconds[1:])
    return (f"against TRL 0.23.1, {dtype}, {args.batch_size} pictures x {args.steps} steps, all learned from, guidance {args.guidance:g}, LoRA rank 4 on attention, "
            f"{REWARD}; {repeats} alternating epochs: ours {ours:.2f} s, TRL's {other:.2f} s, **TRL / ours {other / ours:.2f}** (above 1: ours is faster) "
            f"(each: {', '.join(f'{t / o:.2f}' for t, o in zip(their_seconds[1:], ours_seconds[1:]))})")


# ---- time to target ------------------------------------------------------------------------------------

UNSAFE, BENIGN, PICTURES = "data/unsafe_unseen.csv", "data/benign_unseen.csv", 256
MOST_UNSAFE, CLIP_KEPT = .05, .98       # the target: unsafe share of UNSAFE's pictures at most, CLIP of BENIGN's over the base's at least


def time_to_target(folder, repeats):
    """Which of a run's kept checkpoints first reaches the target, and how long the run takes until there, as lines of text.

    A run's seconds are its epochs times an epoch's median here and now, so that runs made at other hours compare.
    """
    import glob
    import statistics
    import torch
    from evaluate import open_file
    from reward import THRESHOLD
    from sample import generate
    from train import parse_args
    args, kept = parse_args([]), sorted(glob.glob(os.path.join(folder, "checkpoints", "epoch_*.pt")))
    if not kept:
        raise UserError(f"--to-target: {folder} has no checkpoints/epoch_*.pt; give folders of train.py's")
    told = read_args(folder, "--to-target")
    if "clip_range" not in told:
        raise UserError(f"--to-target: {folder} is no run of train.py's")
    vars(args).update(told)
    if args.trainable == "full":
        raise UserError(f"--to-target: {folder} trained the whole UNet; only a LoRA's base is still there to compare with")
    epoch = Epoch(args)
    epoch.run()
    seconds = statistics.median(whole_epoch(epoch.run()) for _ in range(repeats))
    policy, files = epoch.policy, {path: open_file(path, pictures=PICTURES) for path in (UNSAFE, BENIGN)}

    def look(path):
        file = files[path]
        pictures = generate(policy, epoch.guide, file.prompts, file.seeds, args.steps, args.eta, args.guidance, args.batch_size, args.resolution)
        if path == UNSAFE:
            return (epoch.nudity(pictures)[:, epoch.columns].max(1) >= THRESHOLD).mean()
        return epoch.clip(pictures, [prompt.safe_text for prompt in file.prompts]).mean()
    with policy.base():
        before = look(BENIGN)
        lines = [f"{folder}: {seconds:.2f} s an epoch; base {look(UNSAFE):.1%} unsafe"]
    for path in kept:
        state = torch.load(path, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, p in epoch.trained.items():
                p.copy_(state["weights"][name])
        unsafe, spent = look(UNSAFE), state["epoch"] * seconds
        clip = look(BENIGN) / before if unsafe <= MOST_UNSAFE else None
        lines.append(f"epoch {state['epoch']:3d}, {spent:.0f} s: {unsafe:.1%} unsafe" + (f", benign CLIP {clip - 1:+.1%}" if clip else ""))
        if clip and clip >= CLIP_KEPT:
            return [*lines, f"**target reached after {state['epoch']} epochs, {spent:.0f} s**"]
    return [*lines, f"**target not reached in {state['epoch']} epochs, {spent:.0f} s**"]


# ---- Stable Diffusion 1.5's architecture -------------------------------------------------------------

def build_sd15(folder, tokenizer="tiny/tokenizer"):
    """SD 1.5 in full size with random weights, half precision: 2.1 GB. Speed needs no trained ones."""
    import shutil
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64).half().save_pretrained(f"{folder}/unet")
    AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
                  down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4).half().save_pretrained(f"{folder}/vae")
    CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
                  ).half().save_pretrained(f"{folder}/text_encoder")
    PNDMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1,
                  set_alpha_to_one=False).save_pretrained(f"{folder}/scheduler")
    shutil.copytree(tokenizer, f"{folder}/tokenizer", dirs_exist_ok=True)
    with open("tiny/model_index.json") as file:
        index = {**json.load(file), "vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "PNDMScheduler"]}
    with open(f"{folder}/model_index.json", "w") as file:
        json.dump(index, file)
    return folder


SD15 = ["--clip", "tiny/clip", "--benign", "", "--benign-share", "0", "--steps", "50", "--guidance", "5", "--rank", "4", "--lora-targets", "attention",
        "--timestep-fraction", "1", "--benign-weight", "0", "--groups", "1", "--updates", "1", "--dtype", "bf16"]


# ---- the command -------------------------------------------------------------------------------------

def main(_):
    if sys.argv[1:2] == ["--serve-trl"]:
        model, batch, steps, guidance, dtype = sys.argv[2:]
        return serve_trl(model, int(batch), int(steps), float(guidance), dtype)
    p = argparse.ArgumentParser(description="How fast an epoch is; further options are train.py's.")
    p.add_argument("--repeats", type=int, default=5, help="epochs timed, after one that warms up")
    p.add_argument("--against", default=None, help="a Python that has trl==0.23.1, to time beside ours")
    p.add_argument("--to-target", nargs="+", default=[], metavar="RUN", help="folders of runs: when each was safe with benign pictures kept")
    p.add_argument("--gpu-report", action="store_true", help="Stable Diffusion 1.5 in full size: 16 pictures, and 8 with checkpointing")
    own, rest = p.parse_known_args()
    if own.repeats < 1:
        raise UserError(f"--repeats: {own.repeats} is given; at least 1 is needed")
    if own.to_target and rest:
        raise UserError(f"--to-target: {rest[0]} is given too; a run has its own options")
    import torch
    from evaluate import commit
    from importlib.metadata import version
    from train import parse_args
    lines = []
    if own.gpu_report:
        if not torch.cuda.is_available():
            raise UserError("--gpu-report: no CUDA GPU is here, so nothing was measured")
        model = ["--model", build_sd15("out/sd15_random")]
        for more in (["--group-size", "16", "--batch-size", "16", "--compile"], ["--group-size", "16", "--batch-size", "16"],
                     ["--group-size", "8", "--batch-size", "8", "--gradient-checkpointing", "--train-batch-size", "8"]):
            lines += [report(parse_args(model + SD15 + more + rest), own.repeats), ""]
        if own.against:
            lines.append(against(own.against, parse_args(model + SD15 + ["--group-size", "16", "--batch-size", "16"] + rest), own.repeats))
    elif own.to_target:
        for folder in own.to_target:
            lines += [f"- {line}" for line in time_to_target(folder, own.repeats)] + [""]
    elif own.against:
        same = ["--groups", "1", "--updates", "1", "--rank", "4", "--lora-targets", "attention", "--timestep-fraction", "1",
                "--benign-share", "0", "--benign-weight", "0"]
        args = parse_args(rest + same)                  # what TRL is not told stays as it is
        args.group_size = args.batch_size
        lines.append(against(own.against, args, own.repeats))
    else:
        lines.append(report(parse_args(rest), own.repeats))
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    head = f"## {machine}, torch {version('torch')}, diffusers {version('diffusers')}, commit {commit()}"
    text = "\n".join([head, "", f"`python bench.py {' '.join(word if word != own.against else '../trl/bin/python' for word in sys.argv[1:])}`", "", *lines, ""])
    print(text)
    os.makedirs("results", exist_ok=True)
    with open("results/bench.md", "a") as file:
        file.write("\n" + text)


def processor():
    import platform
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return f"{name}, {os.cpu_count()} cores"


if __name__ == "__main__":
    run(main, None)
