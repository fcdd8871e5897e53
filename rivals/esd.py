"""ESD (Gandikota et al., ICCV 2023, arXiv 2303.07345): learn to answer a concept by its opposite.

Ours: the concept is several names, or the prompts of a file, of which every iteration draws a
batch; the pictures on the way are DDIM's with eta 1, drawn by the model that learns, as in the
paper (the authors' present script: by the frozen one). ESD-u trains every weight outside of
cross-attention, 606 of Stable Diffusion's tensors; their script the linear and convolutional
layers' alone, 388. eta is the paper's; their --negative_guidance is eta + 1, so that its default of
2 is our 1. The settings for Stable Diffusion are the paper's; the script's now are 200 iterations
at 5e-5.
"""
from rivals import Edit
from rivals.editing import on_the_way, states, using_weights


def esd_loss(e_c, base_c, base_empty, eta):
    """The squared error of e_theta(x_t, c) to e(x_t, "") - eta (e(x_t, c) - e(x_t, "")), section 4.

    All (B, C, h, w); base_ are the frozen model's. eta 0 erases the prompt, eta above 0 pushes
    away from it. The target's coefficients sum to 1, so that it is the same whether the outputs are
    epsilon or v, which is linear in epsilon at a given x_t. Only a step's weight differs: v's error
    is epsilon's / a_t, so that the noisiest steps count most.
    """
    target = base_empty - eta * (base_c - base_empty)
    return ((e_c - target) ** 2).mean()


def step(job, prompts, rng):
    """x_t comes from the model that is being trained; one random step per batch."""
    output = job.policy.unet_output
    x, t = on_the_way(job, prompts, rng)
    c, empty = states(job.policy, prompts)
    with using_weights(job.trained, job.start):
        base_c, base_empty = output(x, t, c), output(x, t, empty)
    return esd_loss(output(x, t, c), base_c, base_empty, job.args.negative_guidance)


PAPER = "ESD, arXiv 2303.07345"
PAPERS = {                              # of Stable Diffusion; they train no LoRA
    "iterations": 1000,
    "lr": 1e-5,
    "batch_size": 1,
    "negative_guidance": 1.,
    "start_guidance": 3.,
}
# the embedded world's rates are the best of a few tried; of the LoRA rates only ESD-x's was tuned
USES = ("negative_guidance", "start_guidance")
ESD_X = Edit(
    step, f"{PAPER} (ESD-x, cross-attention)", weights=r".*attn2", uses=USES, settings={
        "embedded": {"iterations": 150, "lr": 2e-4, "lora_lr": 3e-4, "batch_size": 16},
        "stable_diffusion": PAPERS,
    })
ESD_U = Edit(
    step, f"{PAPER} (ESD-u, all but cross-attention)", weights=r"(?!.*attn2)", uses=USES, settings={
        "embedded": {"iterations": 150, "lr": 4e-5, "lora_lr": 1e-3, "batch_size": 16},
        "stable_diffusion": PAPERS,
    })
