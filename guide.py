"""Ways to turn prompts into a noise prediction.

A guide is a function (policy, prompts, scale) -> predict(x, t): it encodes once, and predict is then
called at every step with latents x (B, C, H, W) float32 and one timestep t, or one a row (B,). scale is
a number or one a prompt (B,). Rivals share this signature, so that a name swaps one for another.
"""
import torch


def twice(t):
    """Timesteps for both halves of a batch."""
    return torch.cat([t, t]) if t.ndim else t


def plain(policy, prompts, scale):
    """Classifier-free guidance (arXiv 2207.12598): both halves in one call; a scale of 1 needs one half."""
    text = policy.encode(prompts)                                               # (B, L, D)
    if torch.is_tensor(scale):
        scale = scale.to(text.device).view(-1, 1, 1, 1)
    elif scale == 1:
        return lambda x, t: policy.unet_output(x, t, text)
    both = torch.cat([policy.encode([""]).expand_as(text), text])               # (2B, L, D)

    def predict(x, t):
        without, with_text = policy.unet_output(torch.cat([x, x]), twice(t), both).chunk(2)
        return without + scale * (with_text - without)
    return predict


GUIDES = {"plain": plain}
