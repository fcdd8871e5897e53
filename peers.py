"""Sharing an epoch between the processes that torchrun starts; one process alone passes through.

Every process knows the whole epoch: its prompts, seeds, rewards, advantages. Each draws and learns from its
own batches (number % size == rank); gradients are summed, so that the update is one process's to rounding.
"""
import os
import sys

from prompts import UserError

GONE = ("another process of this run has ended; this one ends too, "
        "and the same command goes on from the last checkpoint")


def rank():
    return int(os.environ.get("RANK", 0))


def size():
    return int(os.environ.get("WORLD_SIZE", 1))


def own_device(device):
    """Each process its own GPU: "cuda" -> "cuda:LOCAL_RANK". UserError where there are fewer, or all are sent to one."""
    if device.startswith("cuda:") and size() > 1:
        raise UserError(f"--device: {device} is given with {size()} processes; give cuda, and each takes a GPU of its own")
    if device != "cuda" or size() == 1:
        return device
    import torch
    number, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if number >= there:
        raise UserError(f"--nproc-per-node: process {number} has no GPU of its own, {there} are here; start as many processes, or give --device cpu")
    return f"cuda:{number}"


def start(device):
    """Meet the others: NCCL between GPUs, gloo between CPUs."""
    if size() == 1:
        return
    import signal
    from datetime import timedelta
    import torch

    def end(*_):                                        # torchrun ends the others when one has died
        sys.stderr.write(f"train.py: {GONE}\n")
        os._exit(143)
    signal.signal(signal.SIGTERM, end)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(hours=6))


def gone(error):
    return f"{GONE} ({str(error).partition(chr(10))[0]})"


def gather(thing):
    """Everybody's thing, by rank, to everybody."""
    if size() == 1:
        return [thing]
    import torch
    things = [None] * size()
    try:
        torch.distributed.all_gather_object(things, thing)
    except RuntimeError as error:
        raise UserError(gone(error)) from None
    return things


def add_up(parameters):
    """Sum the gradients over all processes, in one message."""
    if size() == 1:
        return
    import torch
    for p in parameters:
        if p.grad is None:                              # this process had no batch in the update
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.flatten() for p in parameters])
    try:
        torch.distributed.all_reduce(flat)
    except RuntimeError as error:
        raise UserError(gone(error)) from None
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(part.view_as(p))
