"""train.py as a user runs it: the reward rises, nothing is lost, errors are one sentence."""
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
REWARD = """
import numpy as np
def redness(pictures, prompts):
    red = pictures.astype(np.float32).mean((1, 2)) / 255
    return {"reward": red[:, 0] - red[:, 1:].mean(1)}
def broken(pictures, prompts):
    return {"reward": np.array([np.nan] * len(pictures))}
"""


@pytest.fixture(scope="module")
def small(pipeline, tmp_path_factory):
    """Options of a run of seconds on the random pipeline, with a reward that needs no detector."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "mine.py").write_text(REWARD)
    (folder / "p.txt").write_text("a dog\na cat\n")
    return ["--model", pipeline, "--prompts", str(folder / "p.txt"), "--reward", f"{folder}/mine.py:redness", "--steps", "4",
            "--groups", "2", "--group-size", "8", "--batch-size", "8", "--guidance", "1", "--lr", "5e-3", "--updates", "1", "--epochs", "6",
            "--verdict-images", "0", "--preview-every", "2",
            "--timestep-fraction", ".5", "--advantage-scale", "prompt", "--lr-schedule", "constant"]


def start(*options):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ROOT}
    return subprocess.Popen([sys.executable, f"{ROOT}/train.py", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, cwd=ROOT, env=env)


def train(*options):
    process = start(*options)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def results(folder):
    """Everything that a run leaves and that must be equal, as bytes by file name."""
    names = ["metrics.jsonl", "pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"]
    names += [f"samples/{n}" for n in sorted(os.listdir(f"{folder}/samples"))]
    return {n: open(f"{folder}/{n}", "rb").read() for n in names}


@pytest.fixture(scope="module")
def uncut(small, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("uncut") / "run")
    code, out, err = train(*small, "--output-dir", folder)
    assert code == 0, err
    return folder


def test_the_reward_rises(uncut):
    rewards = [json.loads(line)["reward"] for line in open(f"{uncut}/metrics.jsonl")]
    assert len(rewards) == 6 and sum(rewards[-2:]) / 2 > sum(rewards[:2]) / 2 + .01


def test_the_ratio_before_the_first_update_is_exactly_one(uncut):
    assert json.loads(open(f"{uncut}/metrics.jsonl").readline())["first_ratio_deviation"] == 0


def test_a_run_killed_at_ten_random_moments_ends_bit_equal(small, uncut, tmp_path):
    folder, rng, kills, runs = str(tmp_path / "run0"), random.Random(0), 0, 0
    theirs = results(uncut)

    def compare_to_uncut():
        ours = results(folder)
        assert ours.keys() == theirs.keys() and not [n for n in ours if ours[n] != theirs[n]], [n for n in ours if ours[n] != theirs[n]]

    while kills < 10:
        process = start(*small, "--output-dir", folder)
        if kills % 3:                                   # two in three are killed in the loop or after it
            while "UNet rows" not in process.stdout.readline():
                assert process.poll() is None, process.stderr.read()
        try:
            _, err = process.communicate(timeout=rng.uniform(0, 4))
            assert process.returncode == 0, err
            compare_to_uncut()                          # it ended before it was killed:
            runs += 1                                   # the next kills hit a new run
            folder = str(tmp_path / f"run{runs}")
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
    code, _, err = train(*small, "--output-dir", folder)
    assert code == 0, err
    compare_to_uncut()


def test_a_torn_checkpoint_is_never_loaded(uncut):
    import shutil
    from train import load_checkpoint, read_pointer
    folder = f"{uncut}/torn"
    shutil.copytree(f"{uncut}/checkpoints", folder)
    newest, older = read_pointer(folder)
    with open(f"{folder}/{newest['file']}", "r+b") as file:
        file.truncate(1000)
    assert load_checkpoint(folder)["epoch"] == 5
    os.remove(f"{folder}/{older['file']}")
    assert load_checkpoint(folder) is None


def test_a_reward_that_is_not_a_number_is_refused_and_named(small, tmp_path):
    options = [o.replace(":redness", ":broken") for o in small]
    code, _, err = train(*options, "--output-dir", str(tmp_path / "run"))
    assert code == 2 and "epoch 1: the reward of 'a " in err and "nan" in err and "Traceback" not in err


@pytest.mark.parametrize("options, said", [
    (["--prompts", "nowhere.csv"], "nowhere.csv does not exist"),
    (["--prompts", "a naked child"], "1 refused"),
    (["--held-out", "a naked child"], "1 refused"),
    (["--benign", "nowhere.txt"], "--benign: the file nowhere.txt does not exist"),
    (["--reward", "mine.txt:f"], "--reward: mine.txt:f is not of the form"),
    (["--device", "gpu"], "--device: gpu is not to be had"),
    (["--seed", "-1"], "--seed is 0 or more"),
    (["--benign", "a dog", "--benign-share", ".9"], "leaves none to make safe"),
    (["--unsafe-labels", "KNEES"], "KNEES is no label"),
    (["--model", "/nowhere"], "--model: the folder /nowhere does not exist"),
    (["--model", "someone/some-model"], "the hub does not give someone/some-model"),
    (["--eta", "0"], "--eta: 0"),
    (["--benign-weight", "1", "--trainable", "full"], "--benign-weight: 1 is given with --trainable full"),
    (["--batch-size", "5"], "--batch-size: 5 does not divide the 16 pictures"),
    (["--updates", "4"], "--updates: 4 does not divide the 2 batches"),
    (["--lr", "1"], "holds another run (--lr was 0.005, is 1.0)"),
    (["--output-dir", "/proc/run"], "--output-dir: /proc/run can't be written"),
])
def test_a_users_mistake_is_one_sentence(small, uncut, tmp_path, options, said):
    folder = uncut if "--lr" in options else str(tmp_path / "run")
    code, out, err = train(*small, "--output-dir", folder, *options)
    ours = [line for line in err.splitlines() if line.startswith("train.py: ")]
    assert code == 2 and len(ours) == 1 and said in ours[0] and "Traceback" not in err, err


def test_a_full_disk_ends_the_run_with_a_sentence_and_keeps_the_last_checkpoint(small, tmp_path):
    """/dev/full stands for the disk: what is written there fails with ENOSPC."""
    from train import load_checkpoint
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    os.symlink("/dev/full", folder / "checkpoints" / "epoch_0002.pt.tmp")
    code, _, err = train(*small, "--output-dir", str(folder))
    assert code == 2 and "No space left on device" in err and "the last checkpoint stands" in err and "Traceback" not in err
    assert load_checkpoint(str(folder / "checkpoints"))["epoch"] == 1
    assert train(*small, "--output-dir", str(folder))[0] == 0               # the disk has room again


def test_the_default_reward_and_a_memory_resume_bit_equal(small, pipeline, tmp_path):
    """With CLIP, NudeNet, remembered rewards and the benign pull, on prompts of unequal length."""
    prompts = tmp_path / "p.txt"
    prompts.write_text("\n".join(["a dog", "a large peach on a blue background", "a pear", "a small green apple on a red background"]))
    at = small.index("--reward")
    options = small[:at] + small[at + 2:] + ["--prompts", str(prompts), "--memory", "8", "--preview-images", "0",
                                              "--benign", "a plain cup", "--benign-share", ".5"]
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    (tmp_path / "cut").mkdir()
    assert train(*options, "--epochs", "3", "--output-dir", whole)[0] == 0
    assert train(*options, "--epochs", "1", "--output-dir", cut)[0] == 0
    code, out, err = train(*options, "--epochs", "3", "--output-dir", cut)
    assert code == 0 and "going on after epoch 1" in out, err
    for name in ("metrics.jsonl", "pytorch_lora_weights.safetensors"):
        assert open(f"{whole}/{name}", "rb").read() == open(f"{cut}/{name}", "rb").read()
    assert {"clip", "nudity", "unsafe", "buttocks_exposed", "benign_clip", "benign_pull"} <= set(json.loads(open(f"{whole}/metrics.jsonl").readline()))


def test_the_benign_pull_is_the_benign_rows_distance_from_the_base(pipeline):
    """Against the base loaded anew, predicting the whole batch; nothing at all before the LoRA has learned."""
    import torch
    from ddpo import step_log_prob
    from guide import plain
    from model import Policy
    from train import benign_pull, parse_args, sample_epoch
    args = parse_args(["--steps", "3", "--batch-size", "4"])
    policy, base = Policy(pipeline, trainable=True), Policy(pipeline)
    trained = policy.train("lora", 4, "attention")
    asked, quiet = ["a dog", "a cup", "a cat", "a pear"], torch.tensor([False, True, False, True])
    schedule = policy.schedule(3, 1.)
    batch, = sample_epoch(policy, plain, asked, range(4), schedule, args)
    assert benign_pull(policy, plain, batch, asked, quiet, 1, schedule, args) == 0
    with torch.no_grad():
        for p in trained.values():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * .1)
        means = [step_log_prob(plain(one, asked, args.guidance), batch.latents[:, 1], None, schedule, 1)[0]
                 for one in (policy, base)]
    apart = sum(float(((means[0][i] - means[1][i]) ** 2).mean()) for i in (1, 3)) / 4
    pull = benign_pull(policy, plain, batch, asked, quiet, 1, schedule, args)
    assert apart > 0 and pull.item() == pytest.approx(apart, rel=1e-4)
    pull.backward()
    assert all(p.grad is not None for p in trained.values())


def test_help_answers_within_a_second():
    began = time.time()
    subprocess.run([sys.executable, f"{ROOT}/train.py", "--help"], check=True, capture_output=True)
    assert time.time() - began < 1


@pytest.mark.slow
def test_a_full_size_stable_diffusion_runs_an_epoch(pipeline, small, tmp_path):
    """SD 1.5's architecture with random weights, 512 x 512; about 10 GB of memory and ten minutes on 2 cores."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    import shutil
    folder = str(tmp_path / "sd15")
    UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64).half().save_pretrained(f"{folder}/unet")
    AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
                  down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4).half().save_pretrained(f"{folder}/vae")
    CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
                  ).half().save_pretrained(f"{folder}/text_encoder")
    PNDMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1,
                  set_alpha_to_one=False).save_pretrained(f"{folder}/scheduler")
    shutil.copytree(f"{pipeline}/tokenizer", f"{folder}/tokenizer")
    run = str(tmp_path / "run")
    at = small.index("--reward")
    process = start(*small[:at], *small[at + 2:], "--model", folder, "--clip", f"{pipeline}/clip", "--output-dir", run, "--steps", "2",
                    "--groups", "1", "--group-size", "2", "--batch-size", "2", "--epochs", "1", "--guidance", "5", "--lora-targets", "attention", "--rank", "4", "--preview-images", "0", "--gradient-checkpointing")
    out, err = process.communicate(timeout=3600)
    assert process.returncode == 0, err
    assert json.loads(open(f"{run}/metrics.jsonl").readline())["first_ratio_deviation"] < 1e-4
    assert "of 860.3" in out, out                       # 859.5 M weights and the LoRA
    assert os.path.getsize(f"{run}/pytorch_lora_weights.safetensors") > 3e6
