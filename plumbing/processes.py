"""Sharing work between the processes that torchrun starts; one process alone passes through.

An epoch of training: every process knows the whole epoch, its prompts, seeds, rewards and
advantages. Each draws and learns from its own share of every update's pictures; gradients are
summed, so that the update is one process's to rounding. sample.py and evaluate.py: each process
draws every n-th batch of pictures, as one process alone would, and the first one looks at them,
writes and prints.
"""
import os
import sys

from plumbing.options import UserError, first_line

ENDED = ("another process of this run has ended; this one ends too, "
         "and the same command resumes from the last checkpoint")


def rank():
    return number("RANK", 0)


def size():
    return number("WORLD_SIZE", 1)


def number(name, default):
    """A number that torchrun puts into the environment."""
    given = os.environ.get(name, str(default))
    if not given.isdigit():
        raise UserError(f"{name}: {given!r} is in the environment, and torchrun sets it to a "
                        "number; unset it")
    return int(given)


def is_lead():
    """Whether this is the process that writes and prints."""
    return rank() == 0


def own_device(device):
    """Each process its own GPU: "cuda" -> "cuda:LOCAL_RANK"."""
    if device.startswith("cuda:") and size() > 1:
        raise UserError(f"--device: {device} is given with {size()} processes; "
                        "give cuda, and each takes a GPU of its own")
    if device != "cuda" or size() == 1:
        return device
    import torch
    here, count = number("LOCAL_WORLD_SIZE", 1), torch.cuda.device_count()
    if here > count:                                    # all say so: none waits for the others
        raise UserError(f"--nproc-per-node: {here} processes want a GPU each, there "
                        f"{'is' if count == 1 else 'are'} {count}; start at most as many, or give "
                        "--device cpu")
    return f"cuda:{number('LOCAL_RANK', 0)}"


def threads(device):
    """How many threads a library beside torch may take, a torch.device being this process's.

    As many as torch on a CPU; beside a GPU, where torch takes few, this process's share of the CPU.
    """
    import torch
    if device.type == "cpu":
        return torch.get_num_threads()
    return max(1, os.cpu_count() // number("LOCAL_WORLD_SIZE", 1))


def start(device):
    """Meet the others: NCCL between GPUs, gloo between CPUs. Only the first one prints then."""
    if size() == 1:
        return
    if not is_lead():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    import signal
    from datetime import timedelta

    import torch

    def end(*_):                                        # torchrun ends the others when one has died
        sys.stderr.write(f"{os.path.basename(sys.argv[0])}: {ENDED}\n")
        os._exit(143)
    signal.signal(signal.SIGTERM, end)
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)
    try:
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo",
                                             timeout=timedelta(hours=6))
    except (RuntimeError, ValueError, IndexError) as error:
        raise UserError(f"WORLD_SIZE: {size()} processes are said to be there and can't meet "
                        f"({first_line(error)}); start them by torchrun, or unset WORLD_SIZE and "
                        "RANK") from None


def all_batches(count, batch_size):
    """`count` pictures in batches, a list of slices."""
    return [slice(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]


def own_batches(count, batch_size):
    """Of these the ones that this process draws: every n-th, of n processes."""
    return all_batches(count, batch_size)[rank()::size()]


def local_share(count):
    """The pictures, of an epoch's `count`, that this process draws and learns from: (n,) int.

    Every n-th, of n processes: an update, whose pictures can be divided by n, learns from the same
    ones however many processes there are, and each has as many to reward and to pull.
    """
    import numpy as np
    return np.arange(rank(), count, size())


def join_shares(shares):
    """Every process's array (n,), by rank, as one in the epoch's order: (count,)."""
    import numpy as np
    joined = np.empty(sum(map(len, shares)), shares[0].dtype)
    for first, share in enumerate(shares):
        joined[first::len(shares)] = share
    return joined


def gather(thing):
    """What every process has, by rank, to every process."""
    if size() == 1:
        return [thing]
    import torch
    things = [None] * size()
    try:
        torch.distributed.all_gather_object(things, thing)
    except RuntimeError as error:
        raise UserError(f"{ENDED} ({first_line(error)})") from None
    return things


def gather_scores(batches):
    """Every process's scores as one dict {name: (R,)} in the epoch's order.

    batches: this process's, a list of {name: (batch,)}, in the order of local_share; it may be
    empty, where there are more processes than pictures to score.
    """
    import numpy as np
    parts = sum(gather([list(batch) for batch in batches]), [])
    for names in parts:
        if set(names) != set(parts[0]):
            raise UserError(f"--reward: its parts are {', '.join(parts[0])} for some pictures and "
                            f"{', '.join(names)} for others; return the same ones always")
    none = np.empty(0, np.float32)
    scores = {name: np.concatenate([none, *(batch[name] for batch in batches)])
              for name in parts[0]}
    shares = gather(scores)
    return {name: join_shares([share[name] for share in shares]) for name in scores}


def sum_gradients(parameters):
    """Sum the gradients over all processes, in one message."""
    if size() == 1:
        return
    import torch
    parameters = list(parameters)
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.flatten() for p in parameters])
    try:
        torch.distributed.all_reduce(flat)
    except RuntimeError as error:
        raise UserError(f"{ENDED} ({first_line(error)})") from None
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(part.view_as(p))
