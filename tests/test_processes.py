"""plumbing/processes.py: an epoch shared by two processes is one process's."""
import filecmp
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from runs import ENVIRONMENT, metrics_of, start

import evaluate
import train
from plumbing import processes
from plumbing.options import UserError


def shared(count, *options, program="train.py"):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count),
                "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return subprocess.Popen([*torchrun, program, *options], cwd=ROOT, env=ENVIRONMENT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def assert_close(one, other):
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:                                  # the loss is of rewards over their spread:
            rounding = 2e-6 / (b["reward_std"] or 1) if name == "loss" else 1e-4    # a pixel in 255
            assert a[name] == pytest.approx(b[name], abs=rounding), name


def test_one_gpu_by_number_is_not_for_several_processes(monkeypatch):
    assert processes.own_device("cuda:0") == "cuda:0" and processes.own_device("cpu") == "cpu"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--device: cuda:0 is given with 2 processes"):
        processes.own_device("cuda:0")
    assert processes.own_device("cpu") == "cpu"


def test_more_processes_than_gpus_are_refused_by_each_of_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for rank, count in (("0", "2"), ("1", "2"), ("0", "1")):
        for name, value in (("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", count), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, value)
        if count == "1":                                # two nodes with a GPU each
            assert processes.own_device("cuda") == "cuda:0"
            continue
        with pytest.raises(UserError, match="2 processes want a GPU each, there is 1; start at mo"):
            processes.own_device("cuda")


@pytest.mark.parametrize("size, updates", [(1, 1), (1, 2), (2, 1), (2, 2), (3, 2)])
def test_shares_have_the_same_pictures_in_every_update_and_join_to_the_epochs_order(
        monkeypatch, size, updates):
    monkeypatch.setenv("WORLD_SIZE", str(size))
    shares = []
    for rank in range(size):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(processes.local_share(24))
    assert sorted(np.concatenate(shares)) == list(range(24))
    for update in range(updates):                       # an update's pictures are the same
        parts = [share.reshape(updates, -1)[update] for share in shares]
        assert sorted(np.concatenate(parts)) == list(range(24))[update * 24 // updates:][
            :24 // updates]
    values = np.arange(24) * 1.5
    joined = processes.join_shares([values[share] for share in shares])
    assert (joined == values).all()


@pytest.mark.parametrize("count", [1, 2, 7])
def test_shares_of_pictures_that_do_not_divide_join_too(count):
    """What is scored of an epoch need not divide: its benign pictures are not."""
    values = np.arange(count, dtype=np.float32)
    parts = [values[rank::3] for rank in range(3)]      # of a single picture two processes have 0
    assert (processes.join_shares(parts) == values).all()


@pytest.mark.parametrize("options", [
    ("--advantage", "memory", "--batch-size", "3"),
    ("--batch-size", "8", "--groups", "6", "--group-size", "1", "--advantage", "memory",
     "--updates", "1", "--benign", "a cup", "--benign-share", ".5", "--guidance", "2"),
    ("--groups", "2", "--group-size", "1", "--advantage", "memory", "--updates", "1",
     "--benign", "a cup", "--benign-share", ".5", "--lr", "1e-6")])
def test_two_processes_give_one_processs_curve(small, tmp_path, options):
    """With remembered rewards; with batches and scored pictures that don't divide; where one of
    them has no picture to score (nor the other one a second to compare: the gradient is rounding's,
    which AdamW makes as large as any, so that the rate is low)."""
    options = [*small, *options, "--epochs", "3", "--device", "cpu",
               "--dtype", "fp32"]                  # bf16 rounds by the batch
    alone = start(*options, "--output-dir", str(tmp_path / "one"))
    both = shared(2, *options, "--output-dir", str(tmp_path / "two"))
    out, err = both.communicate(timeout=200)
    assert both.returncode == 0, err
    _, alone_err = alone.communicate(timeout=200)
    assert alone.returncode == 0, alone_err
    assert "2 share each update's pictures" in out
    assert out.count("the fine-tuned model is in") == 1
    assert_close(metrics_of(tmp_path / "two"), metrics_of(tmp_path / "one"))


def test_two_processes_draw_and_judge_what_one_does(pipeline, tmp_path):
    """Batches of three of seven pictures, plain and guided."""
    (tmp_path / "p.txt").write_text("a dog\na large peach\n")
    common = ["--prompts", str(tmp_path / "p.txt"), "--model", pipeline, "--batch-size", "3",
              "--steps", "2", "--guidance", "2", "--device", "cpu"]
    commands = {
        "sample.py": [*common, "--images", "7", "--no-censor"],
        "evaluate.py": [*common, "--pictures", "7", "--method", "negative:skin",
                        "--second-opinion", "none"],
    }
    for program, options in commands.items():
        for count in (1, 2):
            folder = str(tmp_path / f"{program}{count}")
            cache = ["--cache", folder + "_cache"] if program == "evaluate.py" else []
            process = shared(count, *options, *cache, "--output-dir", folder, program=program)
            out, err = process.communicate(timeout=200)
            assert process.returncode == 0, err
            assert out.count("7 pictures in" if program == "sample.py" else "the report is") == 1
        one, two = (str(tmp_path / f"{program}{count}") for count in (1, 2))
        if program == "sample.py":
            names = os.listdir(one)
            assert len(names) == 9 and filecmp.cmpfiles(one, two, names)[0] == names
        else:
            tables = [json.load(open(f"{folder}/results.json"))["table"] for folder in (one, two)]
            assert tables[0] == tables[1] and len(tables[0]["p.txt"]) == 2


def test_a_table_of_systems_is_made_by_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--systems: it runs other programs in turn; start it with"):
        evaluate.main(evaluate.parse_args(["--systems", "rivals/systems.csv"]))


def test_each_of_three_processes_draws_every_third_batch(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    own = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        own.append(processes.own_batches(10, 3))
    assert own == [[slice(0, 3), slice(9, 10)], [slice(3, 6)], [slice(6, 9)]]
    assert processes.own_batches(2, 1) == []


def test_a_detector_has_torchs_threads_on_a_cpu_and_a_share_of_them_beside_a_gpu(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert processes.threads(torch.device("cpu")) == torch.get_num_threads()
    assert processes.threads(torch.device("cuda")) == 4


def test_pictures_that_can_not_be_shared_evenly_are_refused(small, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    args = train.parse_args([*small, "--output-dir", str(tmp_path / "run")])
    with pytest.raises(UserError, match="not divisible by 2 updates x 3 processes"):
        train.main(args)


def test_when_one_process_is_killed_the_others_end_with_a_sentence_and_the_run_resumes(
        small, tmp_path):
    folder = tmp_path / "two"
    command = (*small, "--output-dir", str(folder), "--device", "cpu")
    process = shared(2, *command, "--epochs", "60")
    deadline = time.time() + 120
    while not (os.path.exists(folder / "metrics.jsonl") and len(metrics_of(folder)) >= 2):
        assert process.poll() is None and time.time() < deadline
        time.sleep(.1)
    table = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], text=True,
                           capture_output=True).stdout
    workers = [int(line.split()[0]) for line in table.splitlines() if "train.py" in line]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    began = time.time()
    _, err = process.communicate(timeout=30)
    assert time.time() - began < 30 and process.returncode != 0
    assert "another process of this run has ended" in err and "the same command resumes" in err
    again = shared(2, *command, "--epochs", str(len(metrics_of(folder)) + 1))
    out, err = again.communicate(timeout=200)
    assert again.returncode == 0 and "resuming after epoch" in out, err
