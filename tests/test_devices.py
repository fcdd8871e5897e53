"""plumbing/devices.py: what a machine has, and scoring beside sampling."""
import threading

import numpy as np
import pytest
import torch

from plumbing.devices import choose_device, copy_to_cpu, scoring_thread
from plumbing.options import UserError


def test_what_is_not_here_is_refused_with_what_is():
    for device in ("gpu", "cuda:99", "mps"):
        with pytest.raises(UserError, match=f"--device: {device} is not available here; give auto"):
            choose_device(device, "auto")


def test_the_choice_has_a_reason():
    assert choose_device("cpu", "bf16") == ("cpu", "bf16", "as asked")
    device, dtype, why = choose_device("cpu", "auto")
    assert (device, dtype) == ("cpu", "fp32") and "the same on any machine" in why
    _, learning, why = choose_device("cpu", "auto", learning=True)
    assert learning in ("bf16", "fp32") and "processor" in why


def test_on_a_cpu_pictures_are_scored_where_they_are_submitted():
    with scoring_thread(torch.device("cpu")) as scorer:
        future = scorer.submit(lambda x: (x, threading.current_thread()), 3)
        assert future.result() == (3, threading.main_thread())


def test_on_a_gpu_they_are_scored_in_another_thread_with_a_stream_of_its_own(monkeypatch):
    streams = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a stream of {device}")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    with scoring_thread(torch.device("cuda")) as scorer:
        assert scorer.submit(threading.current_thread).result() != threading.main_thread()
    assert streams == ["a stream of cuda"]


def test_a_tensor_arrives_as_an_array():
    assert np.array_equal(copy_to_cpu(torch.arange(3))(), [0, 1, 2])
