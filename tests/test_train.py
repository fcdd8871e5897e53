"""train.py as a user runs it: the reward rises, nothing is lost, errors are one sentence."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

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
            "--groups", "2", "--group-size", "8", "--batch-size", "8", "--guidance", "1", "--lr", "5e-3", "--clip-range", "2e-2", "--updates", "2", "--epochs", "6", "--save-every", "1",
            "--verdict-images", "0", "--preview-every", "2",
            "--timestep-fraction", ".5", "--advantage-scale", "prompt", "--lr-schedule", "constant"]


def start(*options):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ROOT}
    return subprocess.Popen([sys.executable, f"{ROOT}/train.py", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, cwd=ROOT, env=env)


def train(*options):
    return train_beside(options)[0]


def train_beside(*commands):
    """Runs beside each other, a core each: [(exit code, stdout, stderr)]."""
    processes = [start(*options) for options in commands]
    told = [process.communicate(timeout=300) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, told)]


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


def test_the_ratio_is_exactly_one_before_the_first_update_and_not_after_it(uncut):
    row = json.loads(open(f"{uncut}/metrics.jsonl").readline())
    assert row["first_ratio_deviation"] == 0 and row["ratio_deviation"] > 0 and row["approx_kl"] > 0


def test_a_run_killed_at_ten_random_moments_ends_bit_equal(small, uncut, tmp_path):
    """Two runs beside each other, each killed five times."""
    theirs = results(uncut)

    def compare_to_uncut(folder):
        ours = results(folder)
        assert ours.keys() == theirs.keys() and not [n for n in ours if ours[n] != theirs[n]], [n for n in ours if ours[n] != theirs[n]]

    def kill_five_times(seed):
        folder, rng, kills, runs = str(tmp_path / f"run{seed}"), random.Random(seed), 0, 0
        while kills < 5:
            process = start(*small, "--output-dir", folder)
            if kills % 3:                               # some are killed at once, most in the loop or after it
                while "UNet rows" not in process.stdout.readline():
                    assert process.poll() is None, process.stderr.read()
            try:
                _, err = process.communicate(timeout=rng.uniform(0, 4))
                assert process.returncode == 0, err
                compare_to_uncut(folder)                # it ended before it was killed:
                runs += 1                               # the next kills hit a new run
                folder = str(tmp_path / f"run{seed}_{runs}")
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                kills += 1
        code, _, err = train(*small, "--output-dir", folder)
        assert code == 0, err
        compare_to_uncut(folder)

    with ThreadPoolExecutor(2) as both:
        list(both.map(kill_five_times, range(2)))


def test_a_torn_checkpoint_is_never_loaded(uncut):
    import shutil
    from checkpoint import load_checkpoint, read_pointer
    folder = f"{uncut}/torn"
    shutil.copytree(f"{uncut}/checkpoints", folder)
    newest, older = read_pointer(folder)
    with open(f"{folder}/{newest['file']}", "r+b") as file:
        file.truncate(1000)
    assert load_checkpoint(folder)["epoch"] == 5
    os.remove(f"{folder}/{older['file']}")
    assert load_checkpoint(folder) is None


def test_a_reward_that_is_not_a_number_or_that_can_not_stop_the_run_is_refused_and_named(small, tmp_path):
    options = [o.replace(":redness", ":broken") for o in small]
    (code, _, err), (other, _, said) = train_beside([*options, "--output-dir", str(tmp_path / "run")],
                                                    [*small, "--stop-below", ".1", "--output-dir", str(tmp_path / "stop")])
    assert code == 2 and "epoch 1: the reward of 'a " in err and "nan" in err and "Traceback" not in err
    assert other == 2 and "--stop-below" in said and "gives no part 'unsafe'" in said and "Traceback" not in said


@pytest.mark.parametrize("options, said", [
    (["--prompts", "nowhere.csv"], "nowhere.csv does not exist"),
    (["--prompts", "a naked child"], "1 refused"),
    (["--held-out", "a naked child"], "1 refused"),
    (["--guide", "negative", "--concept", "child"], "--concept: 'child' mentions minors"),
    (["--guidance", "0"], "--guidance: 0 is given; 1 or more"),
    (["--max-grad-norm", "0"], "--max-grad-norm: 0.0 is given; it must be above 0"),
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
    (["--keep", "graphs"], "--keep: graphs is given with 2 updates an epoch"),
    (["--held-out", "a/p.csv", "b/p.csv"], "--held-out: two files are named p.csv"),
    (["--stop-below", "5"], "--stop-below: 5 is given; it is a share"),
    (["--lr", "inf"], "--lr: inf is given"),
    (["--guide", "nope"], "--guide: nope is unknown"),
    (["--keep", "gradients", "--updates", "1", "--trainable", "full"], "--keep: gradients is given; it needs --trainable lora"),
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
    from checkpoint import load_checkpoint
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    os.symlink("/dev/full", folder / "checkpoints" / "epoch_0002.pt.tmp")
    options = [*small, "--epochs", "3", "--preview-images", "0", "--output-dir", str(folder)]
    code, _, err = train(*options)
    assert code == 2 and "No space left on device" in err and "the last checkpoint stands" in err and "Traceback" not in err
    assert load_checkpoint(str(folder / "checkpoints"))["epoch"] == 1
    assert train(*options)[0] == 0                      # the disk has room again


def test_the_default_reward_and_a_memory_resume_bit_equal(small, pipeline, tmp_path):
    """With CLIP, NudeNet, remembered rewards and the benign pull, on prompts of unequal length."""
    prompts = tmp_path / "p.txt"
    prompts.write_text("\n".join(["a dog", "a large peach on a blue background", "a pear", "a small green apple on a red background"]))
    at = small.index("--reward")
    options = small[:at] + small[at + 2:] + ["--prompts", str(prompts), "--memory", "8", "--preview-images", "0",
                                              "--benign", "a plain cup", "--benign-share", ".5"]
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    (tmp_path / "cut").mkdir()
    first = train_beside([*options, "--epochs", "3", "--output-dir", whole], [*options, "--epochs", "1", "--output-dir", cut])
    assert [code for code, _, _ in first] == [0, 0], first
    code, out, err = train(*options, "--epochs", "3", "--output-dir", cut)
    assert code == 0 and "going on after epoch 1" in out, err
    for name in ("metrics.jsonl", "pytorch_lora_weights.safetensors"):
        assert open(f"{whole}/{name}", "rb").read() == open(f"{cut}/{name}", "rb").read()
    assert {"clip", "nudity", "unsafe", "buttocks_exposed", "benign_clip", "benign_pull"} <= set(json.loads(open(f"{whole}/metrics.jsonl").readline()))


@pytest.mark.parametrize("given", [{"reward": [1., 2.]}, {"reward": 1.}, {"clip": [1.] * 3}, [1.] * 3, {"reward": [1.] * 3, "mean": .5}, {"reward": ["a", "b", "c"]}])
def test_a_reward_of_another_shape_is_refused(given):
    from prompts import UserError
    from train import parse_args, whole
    with pytest.raises(UserError, match="one number a picture .3."):
        whole(given, 3, parse_args([]))


def test_a_reward_may_be_a_list_an_array_or_a_tensor():
    import numpy as np
    import torch
    from train import whole
    for fine in ([1.] * 3, np.ones((3, 1)), torch.ones(3, requires_grad=True)):
        got = whole({"reward": fine}, 3, None)["reward"]
        assert got.dtype == np.float32 and got.tolist() == [1.] * 3


def random_lora(policy):
    import torch
    trained = policy.train("lora", 4, "all")
    with torch.no_grad():
        for p in trained.values():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * .05)
    return trained


def test_the_benign_pull_is_the_distance_from_the_base(pipeline):
    """Against the base loaded anew; nothing at all before the LoRA has learned."""
    import torch
    from ddpo import step_log_prob
    from guide import plain
    from model import Policy
    from train import benign_pull
    policy, base = Policy(pipeline, trainable=True), Policy(pipeline)
    trained, asked, k = policy.train("lora", 4, "attention"), ["a dog", "a cup", "a cat"], torch.tensor([1, 0, 2])
    schedule, x = policy.schedule(3, 1.), torch.randn(3, *policy.latent_shape(), generator=torch.Generator().manual_seed(0))
    predict = plain(policy, asked, 2.)
    assert (benign_pull(policy, predict, x, k, schedule) == 0).all()
    with torch.no_grad():
        for p in trained.values():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * .1)
        means = [torch.cat([step_log_prob(plain(one, [text], 2.), x[i:i + 1], None, schedule, int(k[i]))[0]
                            for i, text in enumerate(asked)]) for one in (policy, base)]
    pull = benign_pull(policy, predict, x, k, schedule)
    apart = ((means[0] - means[1]) ** 2).flatten(1).mean(1)
    assert (apart > 0).all() and torch.allclose(pull, apart, rtol=1e-4)
    pull.sum().backward()
    assert all(p.grad is not None for p in trained.values())


@pytest.mark.parametrize("keep, per_call", [("nothing", 3), ("nothing", 8), ("nothing", 100), ("graphs", 8), ("gradients", 8)])
def test_an_updates_gradient_is_the_plain_loops(pipeline, keep, per_call):
    """A picture and a timestep at a time, with the loss written out, against calls of any number of picture-timesteps, and against
    what sampling keeps."""
    import numpy as np
    import torch
    from guide import plain
    from model import Policy
    from onpolicy import KEEPERS
    from sample import rollouts
    from train import Drawn, learn, parse_args
    args = parse_args(["--steps", "4", "--batch-size", "4", "--updates", "1", "--timestep-fraction", "1", "--max-grad-norm", "1e9",
                       "--benign-weight", "0", "--train-batch-size", str(per_call)])
    policy = Policy(pipeline, trainable=True)
    trained, schedule = random_lora(policy), policy.schedule(4, 1.)
    asked = ["a dog", "a dog", "a cup", "a cup"] * 2
    keeps = [KEEPERS[keep](policy.unet, range(4)) for _ in range(2)] if keep in KEEPERS else ()
    batches = list(rollouts(policy, plain, asked, range(8), schedule, 2., 4, keeps=keeps))
    latents, log_probs = (torch.cat([batch[i] for batch in batches]) for i in (2, 3))
    advantage = torch.randn(8, generator=torch.Generator().manual_seed(1))
    plainly = {name: torch.zeros_like(p) for name, p in trained.items()}
    for i, text in enumerate(asked):
        for k in range(4):
            a, b, sigma = schedule.a_t[k], schedule.a_prev[k], schedule.sigma[k]
            x, there = latents[i:i + 1, k], latents[i:i + 1, k + 1]
            eps = plain(policy, [text], 2.)(x, schedule.t[k])
            mean = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b - sigma ** 2).sqrt() * eps
            log_p = torch.distributions.Normal(mean, sigma).log_prob(there).mean()
            (-advantage[i] * (log_p - log_p.detach()).exp() / 32).backward()
    for name, p in trained.items():
        plainly[name], p.grad = p.grad, None

    class Held:                                         # an optimizer that keeps the gradient and changes nothing
        def step(self):
            self.grads = {name: p.grad.clone() for name, p in trained.items()}

        def zero_grad(self):
            pass
    held = Held()
    told = learn(policy, plain, trained, held, Drawn(asked, advantage, np.zeros(8, bool), [range(4)] * 2, np.arange(8), latents, log_probs, None, keeps),
                 schedule, 1, np.random.default_rng(0), args)
    size = torch.cat([g.flatten() for g in plainly.values()]).norm()
    off = torch.cat([(held.grads[name] - plainly[name]).flatten() for name in trained]).norm()
    assert size > 0 and off / size < 1e-5
    assert told["first_ratio_deviation"] < 1e-5 and told["clipped_share"] == 0


def test_a_loss_that_is_not_a_number_refuses_the_update_and_names_the_prompt(pipeline):
    import numpy as np
    import torch
    from guide import plain
    from model import Policy
    from prompts import UserError
    from sample import rollouts
    from train import Drawn, learn, parse_args
    args = parse_args(["--steps", "4", "--batch-size", "2", "--updates", "1", "--benign-weight", "0", "--train-batch-size", "2"])
    policy = Policy(pipeline, trainable=True)
    trained, schedule, asked = random_lora(policy), policy.schedule(4, 1.), ["a dog", "a cup"]
    (_, _, latents, log_probs), = rollouts(policy, plain, asked, range(2), schedule, 2., 2)
    latents[1, 1] = float("nan")
    before = {name: p.detach().clone() for name, p in trained.items()}
    drawn = Drawn(asked, torch.ones(2), np.zeros(2, bool), [[0, 1]], np.arange(2), latents, log_probs, None, ())
    with pytest.raises(UserError, match="epoch 7: the loss of 'a .* is nan; the update was refused"):
        learn(policy, plain, trained, torch.optim.AdamW(trained.values()), drawn, schedule, 7, np.random.default_rng(0), args)
    assert all(torch.equal(p, before[name]) for name, p in trained.items())


def test_what_sampling_keeps_changes_no_curve(small, tmp_path):
    """Whole runs with one update an epoch: the graphs and each picture's gradients against a second forward."""
    keeps = ("nothing", "graphs", "gradients")
    for code, _, err in train_beside(*([*small, "--updates", "1", "--dtype", "fp32", "--keep", keep, "--output-dir", f"{tmp_path}/{keep}"] for keep in keeps)):
        assert code == 0, err
    first, *others = ([json.loads(line)["reward"] for line in open(f"{tmp_path}/{keep}/metrics.jsonl")] for keep in keeps)
    for rewards in others:
        assert rewards == pytest.approx(first, abs=.01) and rewards[0] == pytest.approx(first[0], abs=1e-3)


def test_a_guide_with_a_memory_trains_on_policy(small, tmp_path):
    code, _, err = train(*small, "--keep", "nothing", "--guide", "sld-max", "--guidance", "3", "--concept", "dog", "--dtype", "fp32", "--epochs", "1", "--output-dir", str(tmp_path / "run"))
    assert code == 0, err
    assert json.loads(open(f"{tmp_path}/run/metrics.jsonl").readline())["first_ratio_deviation"] < 1e-5


def test_help_answers_within_a_second():
    began = time.time()
    subprocess.run([sys.executable, f"{ROOT}/train.py", "--help"], check=True, capture_output=True)
    assert time.time() - began < 1


@pytest.mark.slow
def test_a_full_size_stable_diffusion_runs_an_epoch(pipeline, small, tmp_path):
    """SD 1.5's architecture with random weights, 512 x 512; about 10 GB of memory and ten minutes on 2 cores."""
    from bench import build_sd15
    folder = build_sd15(str(tmp_path / "sd15"), f"{pipeline}/tokenizer")
    run = str(tmp_path / "run")
    at = small.index("--reward")
    process = start(*small[:at], *small[at + 2:], "--model", folder, "--clip", f"{pipeline}/clip", "--output-dir", run, "--steps", "2",
                    "--groups", "1", "--group-size", "2", "--batch-size", "2", "--epochs", "1", "--guidance", "5", "--lora-targets", "attention", "--rank", "4", "--preview-images", "0", "--gradient-checkpointing")
    out, err = process.communicate(timeout=3600)
    assert process.returncode == 0, err
    assert json.loads(open(f"{run}/metrics.jsonl").readline())["first_ratio_deviation"] < 1e-4
    assert "of 860.3" in out, out                       # 859.5 M weights and the LoRA
    assert os.path.getsize(f"{run}/pytorch_lora_weights.safetensors") > 3e6
