"""SDD (Kim et al., arXiv 2307.05977): a student that answers a concept as it answers no prompt.

Ours: the concept is several names, or the prompts of a file, of which every iteration draws a
batch; the way to z_t is guided by the batch's prompts, where the authors guide it by all concepts
in one prompt, and DDIM's eta on it is 1 (their default: 0); the network is told z_t's own timestep,
where theirs is told one drawn from the 20 around it (and is shown a finished picture at the first:
their loop does not stop before a step); Adam has no weight decay (theirs 1e-4). Gradients are
clipped at a norm of 1, as theirs.
"""
import torch

from rivals import Edit
from rivals.editing import on_the_way, states, using_weights


def sdd_loss(e_c, e_empty):
    """|| sg[e_theta(z_t, "")] - e_theta(z_t, c) ||^2, both the student's, all (B, C, h, w).

    No gradient goes through the first.
    """
    return ((e_c - e_empty.detach()) ** 2).mean()


def step(job, prompts, rng):
    """z_t comes from the teacher, the average of the students."""
    output = job.policy.unet_output
    with using_weights(job.trained, job.average):
        x, t = on_the_way(job, prompts, rng)
    c, empty = states(job.policy, prompts)
    with torch.no_grad():
        e_empty = output(x, t, empty)
    return sdd_loss(output(x, t, c), e_empty)


# the embedded world's rate is the best of a few tried there; its LoRA's is not tried
SDD = Edit(
    step, "SDD, arXiv 2307.05977", weights=r".*attn2", uses=("start_guidance", "ema"),
    keeps_average=True, max_grad_norm=1., settings={
        "embedded": {
            "iterations": 150,
            "lr": 1.4e-4,
            "lora_lr": 1e-3,
            "warm_up": 50,
            "batch_size": 16,
            "ema": .95,
            "start_guidance": 3.,
        },
        "stable_diffusion": {           # the authors'
            "iterations": 1500,
            "lr": 1e-5,
            "batch_size": 1,
            "ema": .999,
            "start_guidance": 3.,
        },
    })
