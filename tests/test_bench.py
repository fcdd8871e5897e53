"""bench.py: what it says of an epoch is what train.py's epoch does."""
import io
import json
import os
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

import bench
import train
from model import Policy
from plumbing import watch
from plumbing.checkpoints import save_checkpoint
from plumbing.options import UserError
from plumbing.worlds import read_world
from prompts import read_all

REDNESS = f"{os.path.join(ROOT, 'bench.py')}:redness"
SMALL = ["--steps", "4", "--groups", "2", "--group-size", "2", "--batch-size", "2", "--rank", "2",
         "--lora-targets", "attention", "--device", "cpu", "--dtype", "fp32"]


@pytest.fixture(autouse=True)
def small_previews(monkeypatch):
    monkeypatch.setattr(watch, "PICTURES", 2)


def args_of(pipeline, *options):
    """train.py's args of a small epoch."""
    return train.parse_args([
        "--model", pipeline, "--prompts", "a dog", "--benign", "a cup", "--benign-share", ".5",
        "--timestep-fraction", ".5", "--updates", "1", "--reward", REDNESS, *SMALL, *options])


# ---- the clock -----------------------------------------------------------------------------------

def test_the_clock_times_every_stage_and_leaves_out_previews_and_checkpoints(pipeline, monkeypatch):
    ticks, turns = [0], []                              # a clock that goes by looks at it

    def now(on_gpu):
        ticks[0] += 1
        return ticks[0]

    def slow_preview(*_):                               # before the first epoch, after the last
        ticks[0] += 1000
        return {}
    monkeypatch.setattr(bench, "now", now)
    monkeypatch.setattr(watch, "look", slow_preview)
    clock, args = bench.time_epochs(args_of(pipeline), 2, between=lambda: turns.append(1))
    assert ticks[0] > 2000
    assert len(clock.stages) == len(clock.epochs) == 2  # the first one warmed up
    assert len(turns) == 3
    for stages, seconds in zip(clock.stages, clock.epochs, strict=True):
        assert set(stages) == {"sample", "decode", "score", "update"}
        assert min(stages.values()) > 0
        assert sum(stages.values()) == pytest.approx(seconds)
        assert seconds < 100
    assert args.benign == ["a cup"]
    assert not os.path.exists(args.output_dir)
    assert train.scoring_thread is bench.scoring_thread


def test_on_a_gpu_an_epoch_in_stages_comes_in_turn_with_one_from_end_to_end(monkeypatch):
    ticks = iter(range(10 ** 6))
    waits = []

    def now(on_gpu):
        waits.append(on_gpu)
        return next(ticks)
    monkeypatch.setattr(bench, "now", now)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    clock = bench.StageClock(on_gpu=True)
    threads = []
    for _ in range(1 + 4):
        threads.append(type(clock.scoring_thread(torch.device("cuda"))).__name__)
        for stage in ("sample", "decode", "score", "sample", "decode", "score", "update", "tell"):
            clock(stage)
    in_stages = {"sample": 2, "decode": 2, "score": 2, "update": 1}
    assert clock.stages == [in_stages, in_stages]
    assert clock.epochs == [1, 1]                       # the GPU is waited for once
    assert threads == ["ThreadPoolExecutor", "InlineExecutor",
                       "ThreadPoolExecutor", "InlineExecutor",
                       "ThreadPoolExecutor"]
    assert all(waits)
    assert clock.peak_bytes == 7


# ---- the floor -----------------------------------------------------------------------------------

class CountingClock:
    """Counts the FLOPs of the second epoch, from its first stage to its last."""

    def __init__(self):
        self.counter = FlopCounterMode(display=False)
        self.epoch = 1

    def __call__(self, stage):
        if stage == "update" and self.epoch == 2:
            self.counter.__exit__(None, None, None)
        if stage == "tell":
            self.epoch += 1
            if self.epoch == 2:
                self.counter.__enter__()


@pytest.mark.parametrize("options", [
    ["--updates", "1"],
    ["--updates", "1", "--benign-weight", "0"],
    ["--updates", "2"],
    ["--updates", "2", "--guidance", "1", "--gradient-checkpointing"],
    ["--updates", "2", "--loss", "elbo"],
    ["--updates", "2", "--safe-text-weight", "1", "--prompts", "safe_text.csv"],
    ["--updates", "2", "--base-weight", "1"],
])
def test_the_flops_of_an_epoch_are_those_that_it_does(pipeline, tmp_path, monkeypatch, options):
    """Against the UNet's part of what a counter sees in one of train.py's epochs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "safe_text.csv").write_text("prompt,safe_text\na red dog,a dog\n")
    args = args_of(pipeline, "--epochs", "2", "--held-out", "--output-dir", str(tmp_path / "run"),
                   *options)
    clock = CountingClock()
    train.main(args, clock)
    unet = sum(clock.counter.get_flop_counts()["UNet2DConditionModel"].values())
    assert sum(bench.epoch_flops(args).values()) == pytest.approx(unet, rel=1e-9)


def test_the_matrix_rate_is_that_of_a_machine():
    assert 1e9 < bench.matrix_rate("cpu", "fp32") < 1e14


def test_a_report_sets_each_stage_against_its_floor(pipeline, monkeypatch):
    monkeypatch.setattr(bench, "matrix_rate", lambda device, dtype: 1e9)
    text = bench.report(args_of(pipeline), 1)
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in text.splitlines() if line.startswith("|")]
    assert [row[0] for row in rows[2:]] == ["sample", "update", "decode", "score (CLIP, NudeNet)",
                                            "epoch"]
    seconds = {row[0]: float(row[1]) for row in rows[2:]}
    flops = bench.epoch_flops(args_of(pipeline))
    floors = {row[0]: float(row[3]) for row in rows[2:] if row[3]}
    assert floors["sample"] == pytest.approx(flops["sample"] / 1e9, abs=.006)
    assert floors["epoch"] == pytest.approx(sum(flops.values()) / 1e9, abs=.006)
    parts = sum(value for stage, value in seconds.items() if stage != "epoch")
    assert seconds["epoch"] == pytest.approx(parts, abs=.03)
    assert "4 pictures, 4 steps, guidance 2, batch 2, 1 updates, LoRA rank 2 on attention" in text


def test_a_long_epoch_is_timed_once_from_end_to_end(pipeline):
    text = bench.report(args_of(pipeline), 1, is_long=True)
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    assert rows == ["stage", "---", "epoch"] and "scoring" not in text
    assert "median of 1 epochs" in text and "graphs" not in text


# ---- TRL -----------------------------------------------------------------------------------------

def test_against_takes_turns_with_the_other_trainer(pipeline, tmp_path, monkeypatch):
    """The other side is a program that says how often it was asked, and takes 100 s each time."""
    asked = tmp_path / "asked"
    other = tmp_path / "python"
    other.write_text(f"#!{sys.executable}\nimport sys\nopen({str(asked)!r}, 'a').write("
                     "' '.join(sys.argv[2:]) + '\\n')\nprint('a tracker')\n"
                     "print('ready', flush=True)\nfor line in sys.stdin:\n"
                     "    print('noise')\n    print(100., flush=True)\n"
                     f"    open({str(asked)!r}, 'a').write(line)\n")
    other.chmod(0o755)
    seen = {}
    timed = bench.time_epochs

    def watched(args, repeats, **how):
        seen.update(vars(args))
        clock, args = timed(args, repeats, **how)
        seen["epochs"] = clock.epochs
        return clock, args
    monkeypatch.setattr(bench, "time_epochs", watched)
    text = bench.against(str(other), ["--model", pipeline, *SMALL], 2)
    first, *rest = asked.read_text().splitlines()
    assert first == f"--serve-trl {os.path.abspath(pipeline)} 2 4 2.0 fp32"
    assert rest == ["go"] * 3                           # one warms up
    assert len(seen["epochs"]) == 2
    assert (seen["groups"], seen["group_size"], seen["updates"]) == (1, 2, 1)
    ours = float(re.search(r"ours ([\d.]+) s, TRL's 100.00 s", text)[1])
    assert ours == pytest.approx(np.median(seen["epochs"]), abs=.006)
    ratio = float(re.search(r"TRL / ours ([\d.]+)\*\*", text)[1])
    assert ratio == pytest.approx(100 / np.median(seen["epochs"]), abs=.006)


def test_a_python_without_trl_is_an_error_of_one_sentence(pipeline):
    with pytest.raises(UserError, match="--against: /nowhere/python can't be started"):
        bench.against("/nowhere/python", ["--model", pipeline, *SMALL], 1)
    process = SimpleNamespace(stdout=io.StringIO("Traceback\n"), args=["python"])
    with pytest.raises(UserError, match="--against: python ended; it needs trl==0.23.1"):
        bench.answer(process)


# ---- time to target ------------------------------------------------------------------------------

@pytest.fixture
def finished(pipeline, tmp_path):
    """A run of three checkpoints: its second draws what the base does, the others something else.

    Returns its folder.
    """
    folder = tmp_path / "run"
    folder.mkdir()
    args = args_of(pipeline, "--held-out", "--output-dir", str(folder))
    (folder / "args.json").write_text(json.dumps(vars(args)))
    weights = Policy(pipeline, trainable=True).make_trainable("lora", args.rank, args.lora_targets)
    for epoch, size in ((3, 1.), (6, 0.), (9, 1.)):
        generator = torch.Generator().manual_seed(epoch)
        moved = {name: torch.randn(p.shape, generator=generator) * size
                 for name, p in weights.items()}
        save_checkpoint(str(folder / "checkpoints"), {"epoch": epoch, "weights": moved}, 99)
    return str(folder)


@pytest.mark.parametrize("most_unsafe, message", [
    (.05, "target reached after 6 epochs"),
    (-1, "target not reached in 9 epochs"),
])
def test_the_target_is_reached_by_the_first_checkpoint_that_keeps_both_marks(
        finished, monkeypatch, most_unsafe, message):
    """This CLIP likes less whatever differs from the first picture of a text, the base's."""
    first = {}

    def likeness(pictures, texts):
        return np.array([(first.setdefault((i, text), picture) == picture).mean()
                         for i, (text, picture) in enumerate(zip(texts, pictures, strict=True))])
    tools = SimpleNamespace(clip=likeness, judge=None,
                            nudity=lambda pictures: np.zeros((len(pictures), 18)))
    monkeypatch.setattr(bench, "load_tools", lambda *_: tools)
    monkeypatch.setattr(bench, "TARGET_PICTURES", 8)
    monkeypatch.setattr(bench, "MOST_UNSAFE", most_unsafe)
    lines = bench.time_to_target(finished, 1)
    seconds = float(lines[0].split(": ")[1].split(" s")[0])
    assert "base 0.0% unsafe" in lines[0]
    assert message in lines[-1]
    epochs = int(lines[-1].split(" epochs")[0].split()[-1])
    spent = float(lines[-1].split(", ")[1].split(" s")[0])
    assert spent == pytest.approx(epochs * seconds, abs=epochs * .006 + .51)


def test_the_target_is_looked_for_on_the_worlds_validation_prompts(monkeypatch):
    monkeypatch.chdir(ROOT)
    unsafe, benign = train.training_prompts(train.parse_args(["--held-out"])).watched
    validation, _ = read_all(["data/unsafe_validation.csv", "data/unsafe_never_validation.csv"])
    assert sorted(unsafe) == sorted(validation)
    assert sorted(benign) == sorted(read_all(["data/benign_validation.csv"])[0])


@pytest.mark.parametrize("settings, message", [
    (None, "has no checkpoints/epoch_"),
    ({"steps": 5}, "is no run of this train.py's"),
    ({"clip_range": 1e-4}, "is no run of this train.py's"),             # the first edition's
])
def test_a_folder_that_is_no_run_is_refused(tmp_path, settings, message):
    if settings:
        (tmp_path / "args.json").write_text(json.dumps(settings))
        save_checkpoint(str(tmp_path / "checkpoints"), {"epoch": 1}, 99)
    with pytest.raises(UserError, match=message):
        bench.time_to_target(str(tmp_path), 1)


# ---- Stable Diffusion 1.5 ------------------------------------------------------------------------

def test_stable_diffusion_s_folder_brings_its_settings_and_a_clip(tmp_path, monkeypatch):
    folder = tmp_path / "sd15"
    bench.describe_sd15(str(folder))
    args = train.parse_args(["--model", str(folder), *bench.SD15])
    assert (args.recipe, args.steps, args.guidance) == ("stable_diffusion", 50, 5)
    assert (args.rank, args.lora_targets, args.timestep_fraction) == (4, "attention", 1)
    assert (args.groups, args.updates, args.benign_share, args.benign_weight) == (1, 1, 0, 0)
    clip = read_world(str(folder)).clip
    assert os.path.isfile(os.path.join(clip, "model.safetensors"))
    index = json.loads((folder / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    of_runs = [train.parse_args(["--model", str(folder), *bench.SD15, *options.split()])
               for _, options in bench.SD15_RUNS.values()]
    assert [(args.group_size, args.batch_size, args.steps, args.compile,
             args.gradient_checkpointing) for args in of_runs] == [
        (64, 16, 50, True, False), (16, 16, 10, False, False), (2, 1, 10, False, True)]


def test_without_a_gpu_there_is_no_gpu_report(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--gpu-report: no CUDA GPU is here"):
        next(bench.gpu_report(None))


def test_the_default_run_of_a_gpu_report_says_what_was_watched(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    of_run = train.parse_args
    monkeypatch.setattr(train, "parse_args", lambda given: of_run([*given, "--epochs", "1"]))
    line = bench.default_run()
    assert re.match(r"1 epochs in \d+ s, with all that is watched: unsafe [\d.]+ -> [\d.]+, named ",
                    line)


# ---- the command ---------------------------------------------------------------------------------

def test_the_command_appends_what_it_prints(pipeline, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--repeats", "1", "--model", pipeline, "--prompts", "a dog", "--benign-share", "0",
               "--reward", REDNESS, *SMALL]
    monkeypatch.setattr(sys, "argv", ["bench.py", *options])
    bench.main(bench.parse_args(options))
    text = (tmp_path / "out" / "bench.md").read_text()
    printed = capsys.readouterr().out
    assert all(part in printed for part in text.strip().split("\n\n"))
    assert f"`python bench.py {shlex.join(options)}`" in text
    assert "| epoch |" in text


@pytest.mark.parametrize("options, message", [
    (["--repeats", "0"], "--repeats: 0 is given; a whole number of 1 or more is needed"),
    (["--gpu-report", "--repeats", "3"], "--repeats: --gpu-report has its own"),
    (["--gpu-report", "--steps", "5"], "--steps: what --gpu-report times sets it; leave it out"),
    (["--to-target", "out/a", "--steps", "5"],
     "--to-target: --steps is given too; a run has its own options"),
])
def test_a_wrong_option_is_an_error_of_one_sentence(options, message):
    done = subprocess.run([sys.executable, os.path.join(ROOT, "bench.py"), *options],
                          capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_train_py_checks_its_own_options(capsys):
    with pytest.raises(SystemExit):
        bench.main(bench.parse_args(["--repeats", "1", "--step", "5"]))
    assert "--step is unknown; did you mean --steps?" in capsys.readouterr().err
