"""peers.py: an epoch shared by two processes is one process's."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from peers import own_device
from prompts import UserError
from test_train import ROOT, small, start  # noqa: F401 (small is a fixture)


def shared(processes, *options):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0",
                             "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "train.py", *options], cwd=ROOT, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def curve(folder):
    return [json.loads(line) for line in open(f"{folder}/metrics.jsonl")]


def close(mine, theirs):
    for one, other in zip(mine, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name] == pytest.approx(other[name], abs=1e-4), name


def test_one_gpu_by_number_is_not_for_several_processes(monkeypatch):
    assert own_device("cuda:0") == "cuda:0" and own_device("cpu") == "cpu"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--device: cuda:0 is given with 2 processes"):
        own_device("cuda:0")
    assert own_device("cpu") == "cpu"


@pytest.mark.parametrize("options", [("--memory", "4", "--batch-size", "4"), ("--batch-size", "1", "--groups", "5", "--group-size", "1", "--memory", "8", "--updates", "1")])
def test_two_processes_give_one_processs_curve(small, tmp_path, options):
    """Also with per-prompt memory, and with 5 pictures, which two processes share as 3 and 2."""
    alone = start(*small, *options, "--epochs", "3", "--output-dir", str(tmp_path / "one"))
    process = shared(2, *small, *options, "--epochs", "3", "--output-dir", str(tmp_path / "two"))
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert alone.wait(timeout=200) == 0, alone.stderr.read()
    assert "2 processes share the batches" in out and out.count("the fine-tuned model is in") == 1
    close(curve(tmp_path / "two"), curve(tmp_path / "one"))


def test_when_one_process_is_killed_the_others_end_with_a_sentence_and_the_same_command_goes_on(small, tmp_path):
    command = (*small, "--epochs", "60", "--preview-images", "0", "--output-dir", str(tmp_path / "two"))
    process = shared(2, *command)
    deadline = time.time() + 120
    while not (os.path.exists(tmp_path / "two" / "metrics.jsonl") and len(curve(tmp_path / "two")) >= 2):
        assert process.poll() is None and time.time() < deadline
        time.sleep(.1)
    workers = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    workers = [int(line.split()[0]) for line in workers.splitlines() if "train.py" in line]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    began = time.time()
    _, err = process.communicate(timeout=30)
    assert time.time() - began < 30 and process.returncode != 0
    assert "another process of this run has ended" in err and "the same command goes on" in err
    done = len(curve(tmp_path / "two"))
    again = shared(2, *small, "--epochs", str(done + 1), "--preview-images", "0", "--output-dir", str(tmp_path / "two"))
    out, err = again.communicate(timeout=200)
    assert again.returncode == 0 and "going on after epoch" in out, err
