"""How fast an epoch is, against the machine's floor and TRL's trainer; how soon a run is safe.

    python bench.py                                 # the default epoch of the embedded world, here
    python bench.py --steps 10 --updates 1          # any option of train.py's
    python bench.py --against ../trl/bin/python     # the same work by trl==0.23.1, installed there
    python bench.py --to-target out/shield          # when each of a run's checkpoints was made
    python bench.py --gpu-report                    # all of it, on a GPU, in some seven minutes

What is timed is train.py's own loop, in a temporary folder, by a clock that it calls after each
stage; an epoch's seconds leave out what follows its updates: metrics, previews, checkpoints. The
floor is the UNet's FLOPs over the rate at which this machine multiplies matrices in the dtype used:
an epoch can't be faster than it without doing less. Adds what it printed to --output.
"""
import json
import sys
import time

from plumbing.kinds import at_least
from plumbing.options import Parser, UserError, learned_steps, run

PROMPT = "a large peach on a blue background"
SAME = ["--reward", f"{__file__}:redness", "--prompts", PROMPT,
        "--groups", "1", "--updates", "1", "--rank", "4", "--lora-targets", "attention",
        "--timestep-fraction", "1", "--benign-share", "0", "--benign-weight", "0",
        "--safe-text-weight", "0", "--base-weight", "0"]


def parse_args(argv=None):
    """bench.py's own options; further ones are train.py's, in train_options."""
    p = Parser("How fast an epoch is; further options are train.py's.")
    p.add_argument("--repeats", type=at_least(1), default=None,
                   help="epochs timed, after one that warms up (default: 5)")
    p.add_argument("--against", default=None, metavar="PYTHON",
                   help="a Python that has trl==0.23.1, to time beside ours")
    p.add_argument("--to-target", nargs="+", default=[], metavar="RUN",
                   help="folders of runs: when each was safe, with benign pictures kept")
    p.add_argument("--gpu-report", action="store_true",
                   help="the embedded world's default run; then Stable Diffusion 1.5 in full size, "
                        "with random weights, compiled and not, and in little memory")
    p.add_argument("--output", default="out/bench.md",
                   help="Markdown file that the report is added to")
    args, args.train_options = p.parse_known_args(argv)
    if args.to_target and args.train_options:
        p.error(f"--to-target: {args.train_options[0]} is given too; a run has its own options")
    if args.to_target and (args.against or args.gpu_report):
        p.error("--to-target: it looks at runs alone; leave --against and --gpu-report out")
    fixed = {"--epochs", "--save-every", "--output-dir", "--held-out"}
    if args.against:
        fixed |= {"--group-size", *SAME[::2]}
    if args.gpu_report and args.repeats:
        p.error("--repeats: --gpu-report has its own, so that it ends in minutes; leave it out")
    if args.gpu_report and args.train_options:
        p.error(f"{args.train_options[0]}: what --gpu-report times sets it; leave it out")
    args.repeats = args.repeats or 5
    for word in args.train_options:
        if word.partition("=")[0] in fixed:
            p.error(f"{word.partition('=')[0]}: what is timed sets it; leave it out")
    return args


def serve_trl(model, batch, steps, guidance, dtype):
    """In TRL's environment: for every line on stdin an epoch of its trainer, its seconds on stdout.

    The arguments are texts, as main's `against` gives them. Imports nothing of this repository that
    needs torch, since the versions there are TRL's.
    """
    import logging
    logging.disable(logging.WARNING)
    from accelerate import PartialState
    PartialState()                                      # TRL's LoRA pipeline fails without
    import torch
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline
    torch.manual_seed(0)
    config = DDPOConfig(
        num_epochs=1, sample_num_steps=int(steps), sample_batch_size=int(batch),
        sample_num_batches_per_epoch=1, train_batch_size=int(batch),
        train_gradient_accumulation_steps=1, train_num_inner_epochs=1,
        sample_guidance_scale=float(guidance), train_cfg=float(guidance) != 1,
        mixed_precision={"fp32": "no", "bf16": "bf16"}[dtype], save_freq=10 ** 9,
        num_checkpoint_limit=1, log_with=None,
        project_kwargs={"project_dir": "/tmp/trl_bench", "automatic_checkpoint_naming": True})

    def reward(pictures, prompts, metadata):            # redness, of pictures (B, 3, H, W)
        red = pictures.float().mean((2, 3))
        return red[:, 0] - red[:, 1:].mean(1), {}

    def prompt():
        return PROMPT, {}
    pipeline = DefaultDDPOStableDiffusionPipeline(model, use_lora=True)
    trainer = DDPOTrainer(config, reward, prompt, pipeline)
    step = 0
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        step = trainer.step(0, step)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        print(json.dumps(time.perf_counter() - began), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve-trl"]:
        sys.exit(serve_trl(*sys.argv[2:]))
    ARGS = parse_args()

import copy
import gc
import glob
import itertools
import os
import platform
import resource
import shlex
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from statistics import median

import numpy as np
import torch
import torch._dynamo
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

import train
from judging.judges import load_tools
from judging.setup import commit
from model import Policy, plain
from plumbing import watch
from plumbing.checkpoints import load_checkpoint, read_args, restore
from plumbing.devices import DTYPES, InlineExecutor, choose_device, scoring_thread
from plumbing.files import check_places, make_folder
from plumbing.worlds import DEFAULT_MODEL, locate
from prompts import benign_groups
from reward import parse_labels

WARM_UP = 1                             # epochs that are not counted
STAGES = ("sample", "decode", "score", "update")


def redness(pictures, prompts):
    """A cheap stand-in for a reward, the same on both sides of a comparison."""
    red = np.asarray(pictures, np.float32).mean((1, 2)) / 255                       # (N, 3)
    return {"reward": red[:, 0] - red[:, 1:].mean(1)}


# ---- the clock -----------------------------------------------------------------------------------

def now(on_gpu):
    """Seconds on a clock, after what a GPU was given to do is done."""
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


class StageClock:
    """train.main's clock: the seconds of each stage, and of each epoch until its updates are done.

    On a GPU the stages overlap: kernels are queued, and pictures are scored in a thread. There,
    every second epoch is timed in stages, one after the other, and the rest from end to end.
    between: called after each epoch; what it does is not counted.
    """

    def __init__(self, on_gpu, with_stages=True, between=None, warm_up=WARM_UP):
        self.on_gpu = on_gpu
        self.warm_up = warm_up
        self.with_stages = with_stages
        self.between = between
        self.epoch = 1
        self.seconds = dict.fromkeys(STAGES, 0.)        # of the present epoch
        self.stages = []                                # {stage: seconds} of epochs in stages
        self.epochs = []                                # seconds of epochs from end to end
        self.peak_bytes = 0                             # of a GPU's memory
        self.graphs = None                              # compiled until the first batch is drawn
        self.last = now(on_gpu)

    @property
    def in_stages(self):
        """Whether the present epoch is timed in stages."""
        return self.with_stages and (not self.on_gpu or self.epoch % 2 == 0)

    def scoring_thread(self, device):
        """Instead of train.py's: no thread in an epoch that is timed in stages."""
        return InlineExecutor() if self.in_stages else scoring_thread(device)

    def __call__(self, stage):
        if self.graphs is None:
            self.graphs = compiled_graphs()
        if stage == "tell":
            self.end_epoch()
        elif self.in_stages or stage == "update":
            ended = now(self.on_gpu)
            self.seconds[stage] += ended - self.last
            self.last = ended
        if stage == "update" and self.on_gpu and self.epoch > self.warm_up:
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated())

    def end_epoch(self):
        if self.epoch > self.warm_up:
            if self.in_stages:
                self.stages.append(self.seconds)
            if not self.in_stages or not self.on_gpu:
                self.epochs.append(sum(self.seconds.values()))
        if self.between:
            self.between()
        self.epoch += 1
        self.seconds = dict.fromkeys(STAGES, 0.)
        if self.on_gpu:                                 # a preview's memory is no epoch's
            torch.cuda.reset_peak_memory_stats()
        self.last = now(self.on_gpu)


def compiled_graphs():
    """How many graphs torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def time_epochs(args, repeats, with_stages=True, between=None, warm_up=WARM_UP):
    """Train for epochs that warm up and `repeats` more: (StageClock, train.py's args as it ran).

    args: train.py's; its files go into a temporary folder, and nothing is judged at the end.
    """
    on_gpu = choose_device(args.device, args.dtype, learning=True)[0].startswith("cuda")
    clock = StageClock(on_gpu, with_stages, between, warm_up)
    epochs = 2 * repeats if on_gpu and with_stages else repeats
    args = copy.copy(args)
    args.epochs = args.save_every = warm_up + epochs
    args.held_out = []
    with tempfile.TemporaryDirectory() as folder:
        args.output_dir = os.path.join(folder, "run")
        looked_at = watch.PICTURES                      # no figure is asked for
        train.scoring_thread, watch.PICTURES = clock.scoring_thread, 4
        try:
            train.main(args, clock)
        finally:
            train.scoring_thread, watch.PICTURES = scoring_thread, looked_at
    if on_gpu:                                          # the next run has the memory to itself
        gc.collect()
        torch.cuda.empty_cache()
    return clock, args


# ---- the floor -----------------------------------------------------------------------------------

def epoch_flops(args):
    """The UNet's FLOPs of an epoch, {"sample", "update"}, from those of calls of two pictures.

    args: train.py's, with the benign prompts that it takes. Prompts with a safe_text count as often
    as they stand in the files; training takes the hard ones more often.
    """
    device, dtype, _ = choose_device(args.device, args.dtype, learning=True)
    policy = Policy(args.model, (), device, DTYPES[dtype], trainable=True)
    policy.make_trainable("lora", args.rank, args.lora_targets)
    if args.gradient_checkpointing:
        policy.unet.enable_gradient_checkpointing()
    predict = plain(policy, ["a", "a"], args.guidance)
    x = torch.zeros(2, *policy.latent_shape(), device=policy.device)
    t = torch.tensor(1, device=policy.device)

    def forward():
        with torch.no_grad():
            predict(x, t)

    def base_forward():
        with policy.base():
            forward()

    def forward_and_backward():
        predict(x, t).sum().backward()
    sampled, based, learned = (flops_of(work) / 2                                   # per picture
                               for work in (forward, base_forward, forward_and_backward))

    pictures = args.groups * args.group_size
    data = train.training_prompts(args)
    benign = benign_groups(data.benign, args.groups, args.benign_share) * args.group_size
    with_safe_text = np.mean([p.safe_text != p for p in data.prompts]) * (pictures - benign)
    pulls = 1 if learned_steps(args) == args.steps else 2       # that benign pictures have
    from_base = pulls * benign * bool(args.benign_weight)
    half = -(-args.group_size // 2) / args.group_size           # of those that came out safe
    others = pictures - benign - with_safe_text
    from_base += (pulls - 1) * others * half * bool(args.base_weight)            # at most
    from_safe_text = with_safe_text * bool(args.safe_text_weight)
    draws = train.ELBO_DRAWS if args.loss == "elbo" else 1
    decisions = draws * learned_steps(args)             # of a picture
    update = (learned + based) * from_base + sampled * decisions * from_safe_text
    update += learned * decisions * (pictures - benign)
    old = decisions if args.loss == "elbo" else 0       # log-probabilities beside the rollout's
    return {"sample": sampled * pictures * (args.steps + old), "update": update}


def flops_of(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def matrix_rate(device, dtype):
    """FLOP/s of square matrix products, of a size that fills the machine: the best of 12."""
    on_gpu = device.startswith("cuda")
    size = 8192 if on_gpu else 2048
    a, b = (torch.randn(size, size, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    fastest = float("inf")
    for _ in range(12):
        began = now(on_gpu)
        a @ b
        fastest = min(fastest, now(on_gpu) - began)
    return 2 * size ** 3 / fastest


def report(args, repeats, is_long=False):
    """Median seconds of an epoch and its stages against the floor, as Markdown.

    is_long: an epoch takes so long that none warms up, and none is timed in stages.
    """
    clock, args = time_epochs(args, repeats, not is_long, warm_up=0 if is_long else WARM_UP)
    device, dtype, _ = choose_device(args.device, args.dtype, learning=True)
    seconds = {stage: median(epoch[stage] for epoch in clock.stages)
               for stage in STAGES if clock.stages}
    epoch_seconds = median(clock.epochs)
    rate = matrix_rate(device, dtype)
    flops = epoch_flops(args)
    total = sum(flops.values())
    pictures = args.groups * args.group_size
    score_part = seconds.get("score")
    memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20:.1f} GiB"
    if clock.on_gpu:                                    # what scoring adds that sampling can't hide
        if seconds:
            others = seconds["sample"] + seconds["decode"] + seconds["update"]
            score_part = max(0, epoch_seconds - others)
        memory = f"{clock.peak_bytes / 2 ** 30:.1f} GiB of the GPU's"
    settings = [
        f"{pictures} pictures", f"{args.steps} steps", f"guidance {args.guidance:g}",
        f"batch {args.batch_size}", f"{args.updates} updates",
        f"LoRA rank {args.rank} on {args.lora_targets}", dtype]
    settings += [name.replace("_", " ") for name in ("gradient_checkpointing", "compile")
                 if getattr(args, name)]
    compiled = (f"; {clock.graphs} graphs compiled until the first batch was drawn, "
                f"{compiled_graphs() - clock.graphs} later" if args.compile else "")
    scoring = f"scoring takes {score_part / epoch_seconds:.0%} of the epoch; " if seconds else ""
    lines = [
        f"{', '.join(settings)}; median of {repeats} epochs",
        "",
        "| stage | seconds | UNet TFLOP | floor, seconds | measured / floor |",
        "|---|---|---|---|---|",
        *(stage_row(stage, seconds[stage], flops[stage], rate) for stage in ("sample", "update")
          if seconds),
        *(f"| {name} | {seconds[stage]:.2f} | | | |" for stage, name in (
            ("decode", "decode"), ("score", "score (CLIP, NudeNet)")) if seconds),
        stage_row("epoch", epoch_seconds, total, rate),
        "",
        f"{pictures / epoch_seconds:.2f} pictures a second; {scoring}matrix rate "
        f"{rate / 1e12:.2f} TFLOP/s; peak memory {memory}{compiled}",
    ]
    return "\n".join(lines)


def stage_row(name, seconds, flops, rate):
    floor = flops / rate
    return (f"| {name} | {seconds:.2f} | {flops / 1e12:.2f} | {floor:.2f} | "
            f"{seconds / floor:.2f} |")


# ---- TRL -----------------------------------------------------------------------------------------


def against(python, options, repeats):
    """Our epoch and TRL's in turn, as Markdown.

    Both: the same model, LoRA, batch, steps, guidance, dtype, reward; one update, all steps.
    """
    args = train.parse_args([*options, *SAME])
    args.group_size = args.batch_size
    args.gradient_checkpointing = False                 # TRL's has none
    dtype = choose_device(args.device, args.dtype, learning=True)[1]
    command = [os.path.abspath(python), os.path.abspath(__file__), "--serve-trl",
               os.path.abspath(locate(args.model)), str(args.batch_size), str(args.steps),
               str(args.guidance), dtype]
    theirs = []
    with start_trl(command) as process:
        def their_turn():
            process.stdin.write("go\n")
            process.stdin.flush()
            theirs.append(answer(process))
        answer(process)                                 # it is ready
        clock, _ = time_epochs(args, repeats, with_stages=False, between=their_turn)
    ours, theirs = clock.epochs, theirs[WARM_UP:]
    ratios = [f"{their / our:.2f}" for our, their in zip(ours, theirs, strict=True)]
    return (f"against TRL 0.23.1, {dtype}, {args.batch_size} pictures x {args.steps} steps, all "
            f"learned from, guidance {args.guidance:g}, LoRA rank 4 on attention, redness: a cheap "
            f"stand-in, the same on both sides; {repeats} alternating epochs: ours "
            f"{median(ours):.2f} s, TRL's {median(theirs):.2f} s, **TRL / ours "
            f"{median(theirs) / median(ours):.2f}** (above 1: ours is faster) "
            f"(each: {', '.join(ratios)})")


def start_trl(command):
    try:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                cwd=tempfile.gettempdir())
    except OSError as error:
        raise UserError(f"--against: {command[0]} can't be started ({error.strerror}); give a "
                        "Python that has trl==0.23.1") from None


def answer(process):
    """What serve_trl says next: an epoch's seconds, or 0 where it is ready."""
    for line in process.stdout:                         # its libraries may write there too
        if line.strip() == "ready":
            return 0.
        try:
            return float(line)
        except ValueError:
            continue
    raise UserError(f"--against: {process.args[0]} ended; it needs trl==0.23.1")


# ---- time to target ------------------------------------------------------------------------------

MOST_UNSAFE = .03                       # the target: share of the pictures to make safe, at most
TARGET_PICTURES = 512                   # half of them benign


def time_to_target(folder, repeats):
    """Which of a run's kept checkpoints first reaches the target, and after how many seconds.

    The target: unsafe pictures are rare, names and benign CLIP kept, as plumbing/watch.py has it,
    of more pictures of the same validation prompts. A run's seconds are its epochs times an
    epoch's median here and now, so that runs made at other hours compare. Returns lines of text.
    """
    paths = sorted(glob.glob(os.path.join(folder, "checkpoints", "epoch_*.pt")))
    if not paths:
        raise UserError(f"--to-target: {folder} has no checkpoints/epoch_*.pt; "
                        "give folders of train.py's")
    args = args_of_run(folder)
    clock, _ = time_epochs(args, repeats)
    seconds = median(clock.epochs)

    device, dtype, _ = choose_device(args.device, args.dtype, learning=True)
    policy = Policy(args.model, (), device, DTYPES[dtype], trainable=True)
    trained = policy.make_trainable("lora", args.rank, args.lora_targets)
    tools, labels = load_tools(policy.world, device), parse_labels(args.unsafe_labels)
    watched = train.training_prompts(args).watched

    def figures():
        drawn = watch.draw(policy, watched, TARGET_PICTURES, args)
        return watch.count(*drawn, tools.nudity(drawn[-1]), tools, labels)
    with policy.base():
        base = figures()
    lines = [f"{folder}: {seconds:.2f} s an epoch; base {base['watched_unsafe']:.1%} unsafe"]
    for path in paths:
        state = torch.load(path, map_location="cpu", weights_only=True)
        restore(trained, state["weights"])
        epoch, row = state["epoch"], figures()
        spent = epoch * seconds
        kept = ", ".join(f"{name.removeprefix('watched_')} {row[name] / base[name] - 1:+.1%}"
                         for name in watch.KEPT if name in row)
        lines.append(f"epoch {epoch:3d}, {spent:.0f} s: {row['watched_unsafe']:.1%} unsafe, {kept}")
        if row["watched_unsafe"] <= MOST_UNSAFE and watch.keeps(row, base):
            return [*lines, f"**target reached after {epoch} epochs, {spent:.0f} s**"]
    return [*lines, f"**target not reached in {epoch} epochs, {spent:.0f} s**"]


def args_of_run(folder):
    """train.py's args of a run, from its args.json."""
    settings = read_args(folder, "--to-target")
    if "clip_range" not in settings or "recipe" not in settings:
        raise UserError(f"--to-target: {folder} is no run of this train.py's")
    args = train.parse_args(["--model", settings["model"], "--recipe", settings["recipe"]])
    vars(args).update(settings)
    return args


# ---- Stable Diffusion 1.5's architecture ---------------------------------------------------------

SD15 = ["--prompts", PROMPT, "--groups", "1", "--updates", "1", "--benign-share", "0",
        "--benign-weight", "0", "--dtype", "bf16", "--lr", "1e-9"]  # random weights stay such
SD15_RUNS = {                           # how often each is timed, and with what options
    "an epoch, compiled": (1, "--group-size 64 --batch-size 16 --compile "
                              "--no-gradient-checkpointing"),
    "a short one, not compiled": (2, "--group-size 16 --batch-size 16 --steps 10 "
                                     "--no-gradient-checkpointing"),
    "in little memory": (1, "--group-size 2 --batch-size 1 --steps 10 --gradient-checkpointing"),
}


def build_sd15(folder):
    """SD 1.5 in full size with random weights, half precision: 2.1 GB. Speed needs no trained ones.

    Its tokenizer and the CLIP that scores its pictures are the default model's.
    """
    UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64
                         ).half().save_pretrained(f"{folder}/unet")
    AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
                  sample_size=512, down_block_types=("DownEncoderBlock2D",) * 4,
                  up_block_types=("UpDecoderBlock2D",) * 4).half().save_pretrained(f"{folder}/vae")
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                          num_attention_heads=12)
    CLIPTextModel(text).half().save_pretrained(f"{folder}/text_encoder")
    PNDMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear",
                  skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False
                  ).save_pretrained(f"{folder}/scheduler")
    describe_sd15(folder)
    return folder


def describe_sd15(folder):
    """The small files of build_sd15's folder: tokenizer, model_index.json, world.json."""
    default = locate(DEFAULT_MODEL)
    shutil.copytree(os.path.join(default, "tokenizer"), f"{folder}/tokenizer", dirs_exist_ok=True)
    with open(os.path.join(default, "model_index.json"), encoding="utf-8") as file:
        index = json.load(file)
    index |= {"vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "PNDMScheduler"]}
    with open(f"{folder}/model_index.json", "w", encoding="utf-8") as file:
        json.dump(index, file)
    world = {
        "recipe": "stable_diffusion",
        "clip": os.path.relpath(os.path.join(default, "clip"), folder),
    }
    with open(f"{folder}/world.json", "w", encoding="utf-8") as file:
        json.dump(world, file)


def gpu_report(python):
    """Yields the parts of a page on this GPU; against TRL too, where its Python is given."""
    if not torch.cuda.is_available():
        raise UserError("--gpu-report: no CUDA GPU is here, so nothing was measured")
    yield "### The embedded world's default run\n\n" + default_run()
    model = ["--model", build_sd15("out/sd15_random")]
    for name, (repeats, options) in SD15_RUNS.items():
        args = train.parse_args([*model, *SD15, *options.split()])
        yield (f"### Stable Diffusion 1.5's size: {name}\n\n"
               + report(args, repeats, is_long=repeats == 1))
    if python:
        yield ("### Stable Diffusion 1.5's size: TRL\n\n"
               + against(python, [*model, *SD15, "--batch-size", "16", "--steps", "10"], 2))


def default_run():
    """`python train.py`, without its verdict: seconds, and what was watched at both ends."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        train.main(train.parse_args(["--held-out", "--output-dir", folder]))
        seconds = time.perf_counter() - began
        rows = watch.looks(load_checkpoint(os.path.join(folder, "checkpoints"))["metrics"])
    figures = ", ".join(f"{name.removeprefix('watched_')} {value:.3f} -> {rows[-1][name]:.3f}"
                        for name, value in rows[0].items() if name.startswith("watched_"))
    return f"{rows[-1]['epoch']} epochs in {seconds:.0f} s, with all that is watched: {figures}"


# ---- the command ---------------------------------------------------------------------------------

def main(args):
    folder, name = os.path.split(args.output)
    make_folder(folder or ".", "--output")
    check_places(folder, [name], option="--output")
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    versions = f"torch {version('torch')}, diffusers {version('diffusers')}"
    parts = [f"## {machine}, {versions}, commit {commit()}",
             f"`python bench.py {shlex.join(sys.argv[1:])}`"]
    for part in itertools.chain(parts, measured(args)):
        print(part, end="\n\n", flush=True)
        with open(args.output, "a", encoding="utf-8") as file:      # each when it is known
            file.write(f"\n{part}\n")


def measured(args):
    """Yields what was asked for, a part of the page at a time."""
    options = args.train_options
    if args.gpu_report:
        yield from gpu_report(args.against)
    elif args.to_target:
        for folder in args.to_target:
            yield "\n".join(f"- {line}" for line in time_to_target(folder, args.repeats))
    elif args.against:
        yield against(args.against, options, args.repeats)
    else:
        yield report(train.parse_args(options), args.repeats)


def processor():
    """The CPU's name and how many cores it has."""
    name = platform.processor()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            models = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        name = models[0]
    except (OSError, IndexError):
        pass
    return f"{name}, {os.cpu_count()} cores"


if __name__ == "__main__":
    run(main, ARGS)
