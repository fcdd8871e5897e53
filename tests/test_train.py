"""train.py as a user runs it: the reward rises, nothing is lost, errors are one sentence."""
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT
from runs import differing, fork, metrics_of, train, without
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import train as trainer
from bench import compiled_graphs
from ddpo import advantages, draw_steps, pairs, renoise, rollout
from model import Policy, plain
from plumbing import watch
from plumbing.checkpoints import load_checkpoint
from plumbing.options import UserError


@pytest.fixture(scope="module")
def uncut(small, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("uncut") / "run")
    code, out, err = train(*small, "--output-dir", folder)
    assert code == 0, err
    return folder


# ---- a run ---------------------------------------------------------------------------------------

def test_the_reward_rises(uncut):
    """By more than twice the error of a difference of two means of 32 pictures."""
    rows = metrics_of(uncut)
    rewards = [row["reward"] for row in rows]
    error = rows[0]["reward_std"] * (2 / 32) ** .5
    assert len(rewards) == 6 and sum(rewards[-2:]) / 2 > sum(rewards[:2]) / 2 + 2 * error


def test_the_ratio_is_exactly_one_before_the_first_update_and_not_after_it(uncut):
    row = metrics_of(uncut)[0]
    assert row["first_ratio_deviation"] == 0 and row["ratio_deviation"] > 0
    assert row["approx_kl"] > 0


def test_a_run_leaves_what_the_readme_lists(uncut):
    there = set(os.listdir(uncut))
    assert there >= {"args.json", "metrics.jsonl", "curve.png", "samples", "checkpoints",
                     "README.md", "pytorch_lora_weights.safetensors",
                     "pytorch_lora_weights_kohya.safetensors"}
    assert "verdict.json" not in there                  # two prompts: none is kept back
    assert sorted(os.listdir(f"{uncut}/samples")) == [f"epoch_000{i}.png" for i in range(7)]
    args = json.load(open(f"{uncut}/args.json"))
    assert args["recipe"] == "embedded" and args["lr"] == 5e-3


def test_a_run_killed_at_ten_random_moments_ends_bit_equal(small, uncut, tmp_path):
    """Two runs beside each other; an epoch has eight stages."""
    rng, kills, folders = random.Random(0), 0, [str(tmp_path / name) for name in ("one", "other")]

    def begin(folder):
        """(the process, where one hears of each stage that it has ended)"""
        args = trainer.parse_args([*small, "--output-dir", folder])
        heard, told = multiprocessing.Pipe(duplex=False)
        process = fork(trainer.main, args, told.send)
        told.close()
        return process, heard

    while kills < 10:
        running = [begin(folder) for folder in folders]
        stages = rng.randrange(9) if kills else 0       # some while they load, most in the loop
        for _, heard in running:
            with suppress(EOFError):                    # it has ended
                for _ in range(stages):
                    heard.recv()
        time.sleep(rng.uniform(0, .3))
        for i, (process, _) in enumerate(running):
            process.kill()
            process.join()
            kills += process.exitcode == -signal.SIGKILL
            if process.exitcode != -signal.SIGKILL:     # it ended before it was killed:
                assert process.exitcode == 0 and not differing(folders[i], uncut)
                folders[i] += "_again"                  # the next kills hit a new run
    for process, _ in [begin(folder) for folder in folders]:
        process.join(300)
        assert process.exitcode == 0
    assert not any(differing(folder, uncut) for folder in folders)


def test_the_default_reward_and_a_memory_resume_bit_equal(small, tmp_path, capsys):
    """With CLIP, NudeNet, remembered rewards and the benign pull, on prompts of unequal length."""
    prompts = tmp_path / "p.txt"
    prompts.write_text("a dog\na large peach on a blue background\na pear\n"
                       "a small green apple on a red background\n")
    options = [*without(small, "--reward"), "--prompts", str(prompts), "--advantage", "memory",
               "--benign", "a plain cup", "--benign-share", ".5"]
    uncut, cut = str(tmp_path / "uncut"), str(tmp_path / "cut")
    for epochs, folder in (("3", uncut), ("1", cut), ("3", cut)):
        trainer.main(trainer.parse_args([*options, "--epochs", epochs, "--output-dir", folder]))
    assert "resuming after epoch 1" in capsys.readouterr().out
    for name in ("metrics.jsonl", "pytorch_lora_weights.safetensors"):
        assert open(f"{uncut}/{name}", "rb").read() == open(f"{cut}/{name}", "rb").read()
    expected = {"clip", "nudity", "unsafe", "buttocks_exposed", "benign_pull"}
    assert expected <= set(metrics_of(uncut)[0])


PULLS = {                               # weight: (metric, prompt files)
    "--benign-weight": ("benign_pull", "prompt,safe_text\na dog,\n", "a plain cup"),
    "--safe-text-weight": ("safe_text_pull", "prompt,safe_text\na red dog,a dog\n", None),
    "--base-weight": ("base_pull", "prompt,safe_text\na dog,\n", None),
}


@pytest.mark.parametrize("option", PULLS)
def test_a_heavy_pull_keeps_pictures_near_what_they_are_pulled_to(small, tmp_path, option):
    name, rows, benign = PULLS[option]
    (tmp_path / "p.csv").write_text(rows)
    options = [*small, "--prompts", f"{tmp_path}/p.csv"]
    if benign:
        options += ["--benign", benign, "--benign-share", ".5"]
    distance = {}
    for weight, epochs in (("0", "1"), ("1e-9", "8"), ("100", "8")):
        folder = str(tmp_path / weight)
        trainer.main(trainer.parse_args([*options, option, weight, "--epochs", epochs,
                                         "--output-dir", folder]))
        distance[weight] = metrics_of(folder)[-1].get(name)
    assert distance["0"] is None                        # nothing is pulled, nothing is measured
    assert 0 < distance["100"] < distance["1e-9"] / 2


@pytest.mark.parametrize("schedule, rates", [("constant", [1, 1, 1, 1]),
                                             ("linear", [1, .75, .5, .25]),
                                             ("quadratic", [1, .5625, .25, .0625])])
def test_the_rate_follows_its_schedule(small, tmp_path, monkeypatch, schedule, rates):
    seen = []

    class Watched(torch.optim.AdamW):
        def step(self):
            seen.append(self.param_groups[0]["lr"])
            super().step()
    monkeypatch.setattr(trainer.torch.optim, "AdamW", Watched)
    trainer.main(trainer.parse_args([*small, "--epochs", "4", "--updates", "1", "--lr", "1e-3",
                                     "--lr-schedule", schedule, "--output-dir", str(tmp_path)]))
    assert seen == pytest.approx([1e-3 * rate for rate in rates])


def test_a_full_disk_ends_the_run_with_a_sentence_and_keeps_the_last_checkpoint(small, tmp_path):
    """/dev/full stands for the disk: what is written there fails with ENOSPC."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    os.symlink("/dev/full", folder / "checkpoints" / "epoch_0002.pt.tmp")
    args = trainer.parse_args([*small, "--epochs", "3", "--output-dir", str(folder)])
    with pytest.raises(UserError, match="No space left on device.*what was saved before stays"):
        trainer.main(args)
    assert load_checkpoint(str(folder / "checkpoints"))["epoch"] == 1
    trainer.main(args)                                  # the disk has room again
    assert load_checkpoint(str(folder / "checkpoints"))["epoch"] == 3


def test_a_model_that_says_nothing_of_itself_is_trained_and_judged(foreign_pipeline, pipeline,
                                                                   tmp_path, capsys):
    """With Stable Diffusion's recipe, on prompts of which some are kept back; its CLIP is not to
    be had offline, so that the reward and the verdict's are another."""
    world = {"recipe": "stable_diffusion", "clip": f"{pipeline}/clip"}
    model = tmp_path / "model"
    model.mkdir()
    for name in os.listdir(foreign_pipeline):
        os.symlink(f"{foreign_pipeline}/{name}", model / name)
    (model / "world.json").write_text(json.dumps(world))
    rows = "".join(f'"a dog number {i}x","sexual, shocking",{i},7.5\n' for i in range(40))
    (tmp_path / "i2p.csv").write_text("prompt,categories,sd_seed,sd_guidance_scale\n"
                                      + rows + "a storm,violence,1,7\n")
    (tmp_path / "coco.csv").write_text("caption\n" + "".join(f"a cup {i}x\n" for i in range(40)))
    folder = str(tmp_path / "run")
    options = ["--model", str(model), "--prompts", str(tmp_path / "i2p.csv"), "--category",
               "sexual", "--benign", str(tmp_path / "coco.csv"), "--steps", "2", "--groups", "4",
               "--group-size", "2", "--epochs", "1", "--output-dir", folder]
    trainer.main(trainer.parse_args(options))
    out = capsys.readouterr().out
    assert "stable_diffusion: --steps 2 instead of 50, --groups 4 instead of 32" in out
    assert "24 to make safe, 24 benign" in out and "held_out.csv" in out
    verdict = json.load(open(f"{folder}/verdict.json"))
    assert set(verdict) == {"held_out.csv", "held_out_benign.csv"}
    assert set(verdict["held_out.csv"]) == {"before", "after"}
    assert "held_out.csv (unsafe;" in out and "held_out_benign.csv (benign;" in out
    args = json.load(open(f"{folder}/args.json"))
    assert (args["recipe"], args["rank"], args["guidance"]) == ("stable_diffusion", 4, 5)
    assert args["gradient_checkpointing"]
    off = trainer.parse_args(["--recipe", "stable_diffusion", "--no-gradient-checkpointing"])
    assert off.gradient_checkpointing is False


# ---- mistakes ------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, sentence", [
    (["--prompts", "nowhere.csv"], "nowhere.csv does not exist"),
    (["--prompts", "a naked child"], "1 refused"),
    (["--held-out", "a naked child"], "1 refused"),
    (["--benign", "nowhere.txt", "--benign-share", ".5"],
     "--benign: the file nowhere.txt does not exist"),
    (["--reward", "mine.txt:f"], "--reward: mine.txt:f is not of the form"),
    (["--device", "gpu"], "--device: gpu is not available"),
    (["--benign", "a tree", "--benign-share", ".9"], "leaves none to make safe"),
    (["--unsafe-labels", "KNEES"], "KNEES is no NudeNet label"),
    (["--model", "/nowhere"], "--model: the folder /nowhere does not exist"),
    (["--model", "someone/some-model"], "someone/some-model is not available from the hub"),
    (["--updates", "3"], "x --group-size 8) are not divisible by 3 updates x 1 processes"),
    (["--group-size", "1", "--groups", "4"], "--group-size: 1 leaves nothing to compare"),
    (["--held-out", "a/p.csv", "b/p.csv"], "--held-out: the file a/p.csv does not exist"),
    (["--lr", "1"], "holds another run (--lr was 0.005, is 1.0)"),
    (["--output-dir", "/proc/run"], "--output-dir: /proc/run can't be written"),
])
def test_a_users_mistake_is_one_sentence(small, uncut, tmp_path, options, sentence):
    folder = uncut if "--lr" in options else str(tmp_path / "run")
    args = trainer.parse_args([*small, "--output-dir", folder, *options])
    with pytest.raises(UserError) as error:
        trainer.main(args)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_two_held_out_files_of_one_name_are_refused(small, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "p.txt").write_text("a dog\n")
    files = [str(tmp_path / folder / "p.txt") for folder in ("a", "b")]
    args = trainer.parse_args([*small, "--output-dir", str(tmp_path / "run"), "--held-out", *files])
    with pytest.raises(UserError, match="--held-out: two files are named p.txt"):
        trainer.main(args)


def test_a_mistake_ends_the_program_with_exit_code_2_and_no_traceback(small, tmp_path):
    broken = [option.replace(":redness", ":broken") for option in small]
    code, _, err = train(*broken, "--output-dir", str(tmp_path / "run"))
    ours = [line for line in err.splitlines() if line.startswith("train.py: ")]
    assert code == 2 and len(ours) == 1 and "the reward of 'a " in ours[0], err
    assert "Traceback" not in err, err


def test_help_answers_within_a_second_and_its_options_are_few():
    began = time.time()
    done = subprocess.run([sys.executable, f"{ROOT}/train.py", "--help"], check=True, text=True,
                          capture_output=True)
    assert time.time() - began < 1
    options = [line for line in done.stdout.splitlines() if line.startswith("  --")]
    assert 20 < len(options) <= 37


# ---- the update ----------------------------------------------------------------------------------

class Held:
    """An optimizer that keeps the gradients of each update and changes nothing."""
    seen = []

    def __init__(self, parameters, **options):
        self.parameters, self.param_groups = list(parameters), [{}]

    def step(self):
        Held.seen.append([p.grad.clone() for p in self.parameters])

    def zero_grad(self):
        for p in self.parameters:
            p.grad = None

    def state_dict(self):
        return {}


@pytest.fixture
def recorded(monkeypatch):
    """Records an epoch's latents, advantages and steps of the pulls; the LoRA is not zero."""
    record = {"latents": [], "noise": [], "prompts": []}

    def recording_rollout(*args, **options):
        path = rollout(*args, **options)
        record["latents"].append(path[0])
        return path

    def recording_advantages(rewards, prompts, *rest):
        record["prompts"] = list(prompts)
        record["advantage"] = advantages(rewards, prompts, *rest)
        return record["advantage"]

    def recording_renoise(predict, x0, noise, *args):
        record["noise"].append(noise)
        return renoise(predict, x0, noise, *args)

    def recording_steps(*args):
        record["pull_steps"] = draw_steps(*args)
        return record["pull_steps"]

    class RandomLora(Policy):
        def make_trainable(self, *args):
            trained = super().make_trainable(*args)
            with torch.no_grad():
                for p in trained.values():
                    generator = torch.Generator().manual_seed(0)
                    p.copy_(torch.randn(p.shape, generator=generator) * .05)
            record.update(policy=self, trained=trained)
            return trained
    Held.seen.clear()
    monkeypatch.setattr(trainer, "rollout", recording_rollout)
    monkeypatch.setattr(trainer, "advantages", recording_advantages)
    monkeypatch.setattr(trainer, "renoise", recording_renoise)
    monkeypatch.setattr(trainer, "draw_steps", recording_steps)
    monkeypatch.setattr(trainer, "Policy", RandomLora)
    monkeypatch.setattr(trainer.torch.optim, "AdamW", Held)
    monkeypatch.setattr(trainer, "MAX_GRAD_NORM", 1e9)
    return record


BENIGN = "a plain cup"                  # is pulled, and not rewarded


def gradient_by_hand(record, pictures, steps, pulls=(), decision="drawn"):
    """A picture and a timestep at a time, with the loss written out.

    pulls: [(prompt, weight, policy, prompt, which, count)]: what the means of that prompt's
    pictures, of four the first `count`, are pulled to, each at that slice of its two
    record["pull_steps"], or, of which None, at all of `steps`.
    """
    policy, trained = record["policy"], record["trained"]
    schedule, latents = policy.schedule(4), torch.cat(record["latents"])
    rewarded = len(record["prompts"])                   # the benign pictures come after them

    def mean_of(policy, prompt, x, k):
        a, b, sigma = schedule.a_t[k], schedule.a_prev[k], schedule.sigma[k]
        eps = plain(policy, [prompt], 2.)(x, schedule.t[k])
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        return b.sqrt() * x0 + (1 - b - sigma ** 2).sqrt() * eps
    for i in pictures:
        for k in steps:
            x, x_prev = latents[i:i + 1, k], latents[i:i + 1, k + 1]
            prompt = record["prompts"][i] if i < rewarded else BENIGN
            if decision == "expected":                  # the mean of q(x_prev | x, x0)
                a, b, sigma = schedule.a_t[k], schedule.a_prev[k], schedule.sigma[k]
                x0 = latents[i:i + 1, -1]
                noise = (x - a.sqrt() * x0) / (1 - a).sqrt()
                x_prev = b.sqrt() * x0 + (1 - b - sigma ** 2).sqrt() * noise
            mean = mean_of(policy, prompt, x, k)
            gaussian = torch.distributions.Normal(mean, schedule.sigma[k])
            log_p = gaussian.log_prob(x_prev).mean()
            ratio = (log_p - log_p.detach()).exp()
            loss = -record["advantage"][i] * ratio if i < rewarded else 0 * ratio
            (loss / (len(pictures) * len(steps))).backward()
        for pulled, weight, teacher, aim, which, count in pulls:
            is_pulled = prompt == pulled and i % 4 < count
            pull_steps = steps if which is None else record["pull_steps"][i][which]
            for k in pull_steps if is_pulled else []:
                x = latents[i:i + 1, k]
                off = mean_of(policy, prompt, x, k) - mean_of(teacher, aim, x, k).detach()
                (weight * off.pow(2).mean() / len(pictures)).backward()
    by_hand = [p.grad for p in trained.values()]
    for p in trained.values():
        p.grad = None
    return by_hand


@pytest.mark.parametrize("updates, batch_size, decision", [
    (1, 16, "drawn"), (1, 3, "expected"), (2, 8, "drawn"), (2, 3, "drawn"), (2, 100, "expected")])
def test_an_updates_gradient_is_the_plain_loops(small, tmp_path, recorded, updates, batch_size,
                                                decision):
    """However many rows a call has."""
    args = trainer.parse_args([*small, "--output-dir", str(tmp_path / "run"), "--epochs", "1",
                               "--updates", str(updates), "--batch-size", str(batch_size),
                               "--guidance", "2", "--dtype", "fp32", "--device", "cpu",
                               "--decision", decision])
    trainer.main(args)
    assert len(Held.seen) == updates
    for update, gradients in enumerate(Held.seen):
        part = np.arange(16).reshape(updates, -1)[update]
        by_hand = gradient_by_hand(recorded, part.tolist(), [0, 1], decision=decision)
        size = torch.cat([g.flatten() for g in by_hand]).norm()
        off = torch.cat([(g - h).flatten() for g, h in zip(gradients, by_hand, strict=True)]).norm()
        assert size > 0 and off / size < 1e-4
    assert metrics_of(args.output_dir)[0]["clipped_share"] == 0


@pytest.mark.parametrize("updates, batch_size", [(1, 16), (2, 3)])
def test_an_elbo_updates_gradient_is_the_plain_loops(small, tmp_path, recorded, updates,
                                                     batch_size):
    """Of A times the denoising loss of each finished latent, twice at each learned step, in the
    weights of the evidence lower bound."""
    args = trainer.parse_args([*small, "--output-dir", str(tmp_path / "run"), "--epochs", "1",
                               "--updates", str(updates), "--batch-size", str(batch_size),
                               "--guidance", "2", "--dtype", "fp32", "--device", "cpu",
                               "--loss", "elbo"])
    trainer.main(args)
    policy, trained = recorded["policy"], list(recorded["trained"].values())
    schedule, x0 = policy.schedule(4), torch.cat(recorded["latents"])[:, -1]
    fresh = torch.cat(recorded["noise"])
    assert len(Held.seen) == updates and fresh.shape == (16, 4, *x0.shape[1:])
    for update, gradients in enumerate(Held.seen):
        part = np.arange(16).reshape(updates, -1)[update]
        for i in part.tolist():
            for draw, k in enumerate((0, 0, 1, 1)):
                a, b, sigma = schedule.a_t[k], schedule.a_prev[k], schedule.sigma[k]
                noise = fresh[i:i + 1, draw]
                x = a.sqrt() * x0[i:i + 1] + (1 - a).sqrt() * noise
                eps = plain(policy, [recorded["prompts"][i]], 2.)(x, schedule.t[k])
                off = (eps - noise).pow(2).mean()       # the small model predicts the noise
                share = (1 - b - sigma ** 2).sqrt() - (b * (1 - a) / a).sqrt()
                bound = -share ** 2 / (2 * sigma ** 2) * off
                (-recorded["advantage"][i] * bound / (4 * len(part))).backward()
        size = torch.cat([p.grad.flatten() for p in trained]).norm()
        off = torch.cat([(g - p.grad).flatten()
                         for g, p in zip(gradients, trained, strict=True)]).norm()
        assert size > 0 and off / size < 1e-4
        for p in trained:
            p.grad = None


@pytest.mark.parametrize("updates, batch_size, reward", [
    (1, 16, "redness"), (2, 3, "redness"), (2, 8, "redness_of_unsafe_dogs")])
def test_the_pulls_gradient_is_the_plain_loops(pipeline, small, tmp_path, recorded, updates,
                                               batch_size, reward):
    """Of a benign prompt, towards the base loaded anew, at a learned step and at another; of one
    with a safe_text, towards that, at the learned ones; half of the others that no reward finds
    unsafe, towards the base, at the other."""
    (tmp_path / "p.csv").write_text("prompt,safe_text\na red dog,a dog\na cat,\na big dog,\n")
    args = trainer.parse_args([*small, "--output-dir", str(tmp_path / "run"), "--epochs", "1",
                               "--updates", str(updates), "--batch-size", str(batch_size),
                               "--prompts", str(tmp_path / "p.csv"), "--benign", BENIGN,
                               "--reward", small[small.index("--reward") + 1].replace(
                                   "redness", reward),
                               "--benign-weight", "30", "--guidance", "2",
                               "--safe-text-weight", "20", "--base-weight", "10",
                               "--groups", "4", "--group-size", "4", "--benign-share", ".25",
                               "--dtype", "fp32", "--device", "cpu"])
    trainer.main(args)
    assert len(Held.seen) == updates
    base, both, other = Policy(pipeline), slice(0, 2), slice(1, 2)
    pulls = [(BENIGN, 30, base, BENIGN, both, 4),
             ("a red dog", 20 / 2, recorded["policy"], "a dog", None, 4),
             ("a cat", 10, base, "a cat", other, 2)]
    if reward == "redness":                             # which says nothing of what is unsafe
        pulls.append(("a big dog", 10, base, "a big dog", other, 2))
    for update, gradients in enumerate(Held.seen):
        part = np.arange(16).reshape(updates, -1)[update].tolist()
        sizes = []
        for by_hand in (gradient_by_hand(recorded, part, [0, 1], pulls),
                        gradient_by_hand(recorded, part, [0, 1])):
            off = [(g - h).flatten() for g, h in zip(gradients, by_hand, strict=True)]
            sizes.append(torch.cat(off).norm() / torch.cat([h.flatten() for h in by_hand]).norm())
        assert sizes[0] < 1e-4 and sizes[1] > .1        # without the pulls it is another


def test_a_loss_that_is_not_a_number_refuses_the_update_and_names_the_prompt(
        small, tmp_path, recorded, monkeypatch):
    def torn_rollout(*args, **options):
        path = rollout(*args, **options)
        path[0][1, 1] = float("nan")
        return path
    monkeypatch.setattr(trainer, "rollout", torn_rollout)
    monkeypatch.setattr(Held, "step", None)             # it must not be reached
    args = trainer.parse_args([*small, "--output-dir", str(tmp_path / "run"), "--dtype", "fp32"])
    with pytest.raises(UserError, match="is nan at step . of a batch that starts with 'a "):
        trainer.main(args)


def test_the_clock_is_told_every_stage_of_every_epoch(small, tmp_path):
    stages = []
    args = trainer.parse_args([*small, "--output-dir", str(tmp_path / "run"), "--epochs", "2"])
    trainer.main(args, stages.append)
    epoch = ["sample", "decode", "score"] * 2 + ["update", "tell"]
    assert stages == epoch * 2


def test_no_step_reads_a_number_for_which_a_gpu_would_be_waited(small, tmp_path, monkeypatch):
    """In sampling and learning; what the indices cost is for tests/test_gpu.py."""
    asked, seen = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            if function is torch.ops.aten._local_scalar_dense.default:
                asked.append(traceback.format_stack(limit=8))
            return function(*args, **(kwargs or {}))

    def watched_pairs(*args, **options):
        for found in pairs(*args, **options):
            with Watch():
                yield found

    def watched_rollout(predict, *args, **options):
        def watched_predict(x, t):
            with Watch():
                return predict(x, t)
        return rollout(watched_predict, *args, **options)
    monkeypatch.setattr(trainer, "pairs", watched_pairs)
    monkeypatch.setattr(trainer, "rollout", watched_rollout)
    for loss in ("ddpo", "elbo"):
        trainer.main(trainer.parse_args([
            *small, "--output-dir", str(tmp_path / loss), "--epochs", "1", "--loss", loss,
            "--guidance", "2", "--benign", BENIGN, "--benign-share", ".5", "--benign-weight", "1"]))
    assert len(seen) > 1000 and not asked, asked[:1]


def test_the_unet_is_compiled_before_the_first_epoch_and_never_again(small, tmp_path, monkeypatch):
    """With gradient, without, and as the base: three graphs, whatever kernels they become."""
    graphs, compiling, compiler = [], Policy.compile, torch.compile

    def counting(self, *args, **options):
        before = compiled_graphs()
        compiling(self, *args, **options)
        graphs.append(compiled_graphs() - before)
        before = compiled_graphs()
        graphs.append(lambda: compiled_graphs() - before)
    monkeypatch.setattr(torch, "compile", partial(compiler, backend="eager"))
    monkeypatch.setattr(Policy, "compile", counting)
    trainer.main(trainer.parse_args([
        *small, "--output-dir", str(tmp_path / "run"), "--epochs", "2", "--compile",
        "--guidance", "2", "--benign", BENIGN, "--benign-share", ".5", "--benign-weight", "1"]))
    made, later = graphs
    assert made == 3 and later() == 0


# ---- the embedded world, Stable Diffusion's size -------------------------------------------------

def test_the_embedded_world_is_trained_and_judged(tmp_path, monkeypatch, capsys):
    """A short epoch of the default run, with its verdict."""
    monkeypatch.chdir(ROOT)
    folder = str(tmp_path / "run")
    trainer.main(trainer.parse_args([
        "--epochs", "1", "--groups", "4", "--group-size", "4", "--batch-size", "8",
        "--held-out", "data/unsafe_unseen.csv", "--output-dir", folder]))
    out = capsys.readouterr().out
    assert "embedded: --groups 4 instead of 8" in out
    assert "| unsafe_unseen.csv (unsafe; 64 pictures, 60 prompts) | before | after |" in out
    verdict = json.load(open(f"{folder}/verdict.json"))["unsafe_unseen.csv"]
    assert verdict["before"]["unsafe.strict"]["value"] > .5
    assert "named" in verdict["after"]
    assert "before | after" in open(f"{folder}/README.md").read()
    with open(f"{folder}/metrics.jsonl") as file:
        looks = list(map(json.loads, file))
    assert [row["epoch"] for row in looks] == [0, 1]
    for row in looks:                                   # of the world's validation prompts
        assert row["watched_unsafe"] > .3 and row["watched_named"] > .8
        assert row["watched_benign_clip"] > .7
    assert f"watched   0  unsafe {looks[0]['watched_unsafe']:.3f}  named" in out
    exported = load_file(f"{folder}/pytorch_lora_weights.safetensors")
    best = load_file(f"{folder}/best/pytorch_lora_weights.safetensors")
    assert all(torch.equal(best[key], value) for key, value in exported.items())


# ---- a model that comes apart --------------------------------------------------------------------

FALLING = """
import numpy as np
calls = []

def differing(pictures, prompts):
    return {"reward": np.random.default_rng(0).random(len(pictures))}

def constant(pictures, prompts):
    return {"reward": np.ones(len(pictures))}

def changing(pictures, prompts):
    calls.append(1)
    return {"reward": np.ones(len(pictures)), f"part{len(calls)}": np.ones(len(pictures))}
"""


@pytest.fixture
def with_reward(small, tmp_path):
    """with_reward(NAME, more...) -> args of a run with one of the rewards above."""
    (tmp_path / "theirs.py").write_text(FALLING)

    def make(name, *more):
        options = without(small, "--reward")
        return trainer.parse_args([*options, "--reward", f"{tmp_path}/theirs.py:{name}",
                                   "--output-dir", str(tmp_path / "run"), *more])
    return make


def test_a_model_that_comes_apart_ends_the_run_with_the_weights_from_before(
        with_reward, monkeypatch):
    """At the fourth look, after epoch 6, the benign pictures agree with their prompts no more."""
    looks, look = [], watch.look

    def falling(*args):
        look(*args)
        looks.append(.8 if len(looks) < 3 else .6)
        return {"watched_unsafe": .5, "watched_benign_clip": looks[-1]}
    monkeypatch.setattr(watch, "look", falling)
    args = with_reward("differing", "--benign", "a tree", "--benign-share", ".5", "--epochs", "20",
                       "--batch-size", "16", "--updates", "1", "--save-every", "2")
    sentence = ("epoch 6: the CLIP of benign prompts has fallen by 25%, .*the weights of epoch 4, "
                "before the fall, are in .*; give a lower --lr")
    with pytest.raises(UserError, match=sentence) as end:
        trainer.main(args)
    assert end.value.code == 1
    saved = load_file(f"{args.output_dir}/pytorch_lora_weights.safetensors")
    before = load_checkpoint(f"{args.output_dir}/checkpoints", epoch=4)["weights"]
    kept = {name: value for name, value in before.items() if "to_q.lora_B" in name}
    assert kept
    for name, value in kept.items():
        key = "unet." + name.replace(".default", "")
        assert torch.equal(saved[key], value)
    assert "The run ended at epoch 6" in open(f"{args.output_dir}/README.md").read()
    with pytest.raises(UserError, match="has fallen"):              # and it does not go on
        trainer.main(args)


def test_a_reward_that_never_differs_is_said_at_the_end(with_reward, capsys):
    trainer.main(with_reward("constant", "--epochs", "1"))
    assert "rewards differed by less than 1e-6" in capsys.readouterr().err


def test_a_reward_must_have_the_same_parts_always(with_reward):
    with pytest.raises(UserError, match="--reward: its parts are reward, part1 for some pictures"):
        trainer.main(with_reward("changing"))


@pytest.mark.slow
def test_a_full_size_stable_diffusion_runs_an_epoch(tmp_path, monkeypatch, capsys):
    """SD 1.5's architecture with random weights, 512 x 512; 10 GB of memory, ten minutes."""
    from bench import build_sd15
    folder, run = build_sd15(str(tmp_path / "sd15")), str(tmp_path / "run")
    monkeypatch.setattr(watch, "PICTURES", 2)
    trainer.main(trainer.parse_args([
        "--model", folder, "--prompts", "a dog", "--steps", "2", "--groups", "1", "--group-size",
        "2", "--batch-size", "2", "--epochs", "1", "--output-dir", run]))
    assert metrics_of(run)[0]["first_ratio_deviation"] < 1e-4
    out = capsys.readouterr().out
    assert "of 860.3" in out, out                       # 859.5 M weights and the LoRA
    assert "stable_diffusion: --steps 2 instead of 50" in out
    assert os.path.getsize(f"{run}/pytorch_lora_weights.safetensors") > 3e6
