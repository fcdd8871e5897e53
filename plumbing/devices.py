"""Where and in which precision a program computes, and how a GPU's results come back."""
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import torch

from plumbing.options import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def choose_device(device, dtype, learning=False):
    """("auto", "auto") -> what this machine has, with the reason: (device, dtype name, reason).

    On a CPU pictures are drawn in fp32, the same ones on any machine; learning takes bf16 where
    the processor multiplies in it: in the embedded world it then samples 1.4 times and learns 1.2
    times as fast.
    """
    has_cuda = torch.cuda.is_available()
    if device == "auto":
        device = "cuda" if has_cuda else "cpu"
    if not is_usable(device):
        gpus = "".join(f", cuda:{i}" for i in range(torch.cuda.device_count()))
        raise UserError(f"--device: {device} is not available here; give auto, cpu{gpus}")
    if dtype != "auto":
        return device, dtype, "as asked"
    stays = "latents, log-probabilities and the LoRA stay fp32"
    if device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False):
        return device, "bf16", f"the GPU computes in it natively; {stays}"
    if device == "cpu" and learning:
        can = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        if can.get("avx512_bf16") or can.get("amx_bf16"):
            return device, "bf16", f"this processor multiplies in it; {stays}"
        return device, "fp32", "this processor has no bf16 of its own"
    return device, "fp32", "exact, and the same on any machine"


def is_usable(device):
    try:
        asked = torch.device(device)
    except RuntimeError:
        return False
    if asked.type == "cuda":
        return torch.cuda.is_available() and (asked.index or 0) < torch.cuda.device_count()
    return asked.type == "cpu"


class InlineExecutor(Executor):
    """An executor that runs a function where it is submitted."""

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


def scoring_thread(device):
    """An executor: on a GPU one thread, so that pictures are scored beside the next batch.

    It has a stream of its own: in the common one CLIP would wait until that batch is drawn.
    """
    if device.type != "cuda":
        return InlineExecutor()
    return ThreadPoolExecutor(1, initializer=use_own_stream, initargs=[device])


def use_own_stream(device):
    torch.cuda.set_stream(torch.cuda.Stream(device))


def copy_to_cpu(tensor):
    """Start a copy to the CPU; returns a function that waits for it and gives a numpy array.

    On a GPU it waits for this copy alone, not for work that was started after it.
    """
    if tensor.device.type != "cuda":
        return tensor.numpy
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(tensor.device))

    def wait():
        arrived.synchronize()
        return host.numpy()
    return wait
