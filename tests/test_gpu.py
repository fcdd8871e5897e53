"""On a GPU, where there is one: pictures and learning are a CPU's; no step waits for the GPU."""
import json
import os

import pytest
import torch
from conftest import ROOT

import train
from ddpo import denoise, draw_noise, pairs, rollout
from model import Policy, plain
from plumbing.devices import InlineExecutor
from plumbing.worlds import DEFAULT_MODEL

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is here")


@pytest.fixture
def here(monkeypatch):
    monkeypatch.chdir(ROOT)


def run(folder, *options):
    """An embedded run with every term of the loss; its rows of metrics, the base's first."""
    args = train.parse_args(["--held-out", "--output-dir", str(folder), *options])
    train.main(args)
    with open(f"{folder}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def test_a_gpu_draws_what_a_cpu_draws(here, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    texts, latents = ["a large peach", "a small dog"], []
    for device in ("cpu", "cuda"):
        policy = Policy(DEFAULT_MODEL, device=device)
        noise = draw_noise([0, 1], 5, policy.latent_shape()).to(device)
        latents.append(denoise(plain(policy, texts, 2.), noise, policy.schedule(5)).cpu())
    assert torch.allclose(*latents, atol=1e-2)
    assert (latents[0] - latents[1]).abs().mean() < 1e-4


def test_no_step_of_an_epoch_waits_for_the_gpu(here, tmp_path, monkeypatch):
    """torch raises where a step does; the first epoch, in which libraries are set up, may wait.

    So may a text that is encoded for the first time.
    """
    calls = {"rollout": 0, "pairs": 0}

    def mode_of(name, lenient):
        calls[name] += 1
        return "error" if calls[name] > lenient else "default"

    def strict_rollout(predict, *args, **options):
        mode = mode_of("rollout", 1)

        def strict_predict(x, t):
            torch.cuda.set_sync_debug_mode(mode)
            return predict(x, t)
        try:
            return rollout(strict_predict, *args, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def strict_pairs(*args, **options):
        mode = mode_of("pairs", 4)
        try:
            for found in pairs(*args, **options):
                torch.cuda.set_sync_debug_mode(mode)
                yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    encoding = Policy.text_states

    def lenient_encoding(self, text):
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        states = encoding(self, text)
        torch.cuda.set_sync_debug_mode(mode)
        return states
    monkeypatch.setattr(Policy, "text_states", lenient_encoding)
    monkeypatch.setattr(train, "scoring_thread", lambda device: InlineExecutor())   # it waits
    monkeypatch.setattr(train, "rollout", strict_rollout)
    monkeypatch.setattr(train, "pairs", strict_pairs)
    rows = run(tmp_path / "run", "--epochs", "3", "--save-every", "3")
    assert len(rows) == 4 and calls == {"rollout": 3, "pairs": 12}


@pytest.mark.parametrize("options", [["--loss", "elbo"], ["--compile"]])
def test_a_gpus_first_epochs_are_a_cpus(here, tmp_path, options):
    """bf16 on the GPU beside fp32 on the CPU: the same pictures to rounding, at first."""
    common = ["--epochs", "2", "--save-every", "2"]
    ours = run(tmp_path / "gpu", *common, *options)
    theirs = run(tmp_path / "cpu", *common, "--device", "cpu", "--dtype", "fp32",
                 *(option for option in options if option != "--compile"))
    for name in ("watched_unsafe", "watched_named", "watched_benign_clip"):
        assert ours[0][name] == pytest.approx(theirs[0][name], abs=.07)
    for name in ("reward", "clip", "nudity"):
        assert ours[1][name] == pytest.approx(theirs[1][name], abs=.05)
    assert ours[1]["grad_norm"] == pytest.approx(theirs[1]["grad_norm"], rel=.5)
    assert os.path.isfile(tmp_path / "gpu" / "curve.png")
