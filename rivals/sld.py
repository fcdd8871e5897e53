"""SLD (Schramowski et al., CVPR 2023, arXiv 2211.05105): guidance away from a concept.

Beside the empty prompt and the picture's own, the network is asked about the concept, and its
answer is pushed away from that, element by element, with momentum over the steps.

Letters: e(.) the network's noise epsilon; "" the empty prompt, c the prompt, c_s the concept;
s the guidance scale, s_S the safety scale, s_m the momentum scale, beta its decay.
"""
from functools import partial

import torch

from model import repeat
from rivals.guiding import steps_done


def sld(policy, prompts, scale, warm_up=10, safety_scale=1000, threshold=.01, momentum_scale=.3,
        momentum_beta=.4):
    """A guide with these five numbers, medium's if none are given (equations 3 to 8):

        epsilon = e("") + s (e(c) - e("") - gamma)
        gamma   = mu (e(c_s) - e("")) + s_m nu
        mu      = min(1, |s_S (e(c) - e(c_s))|) where e(c) - e(c_s) < threshold, else 0
        nu     <- beta nu + (1 - beta) gamma

    gamma is used once warm_up of 50 steps are done; nu follows the path from its start. The paper
    prints max(1, .) in mu; its code, as ours, takes the minimum. A network that puts out
    v = sqrt(a) epsilon - sqrt(1 - a) x0 has differences 1 / sqrt(a) as large as epsilon's. At a
    guidance of 1, which is none, the authors' pipeline leaves gamma out; ours subtracts it.
    """
    text = policy.encode(prompts)
    empty_text = policy.encode([""]).expand_as(text)
    concept_text = policy.encode([policy.concept]).expand_as(text)
    states = torch.cat([empty_text, concept_text, text])                    # (3B, L, D)
    if torch.is_tensor(scale):
        scale = scale.to(text.device).view(-1, 1, 1, 1)
    nu = None

    def predict(x, t):
        nonlocal nu
        output = policy.unet_output(torch.cat([x, x, x]), repeat(t, 3), states)
        empty, concept, own = output.chunk(3)                               # (B, C, h, w) each
        root = epsilon_root(policy, x, t)
        if nu is None:
            nu = torch.zeros_like(x)
        apart = root * (own - concept)
        mu = (safety_scale * apart).abs().clamp(max=1).where(apart < threshold, 0.)
        gamma = mu * root * (concept - empty) + momentum_scale * nu
        nu = momentum_beta * nu + (1 - momentum_beta) * gamma
        used = gamma.where(steps_done(policy, t) >= warm_up, 0.)
        return empty + scale * (own - empty - used / root)
    return predict


def epsilon_root(policy, x, t):
    """What turns a difference of outputs into one of epsilon: sqrt(a) for v, else 1."""
    if policy.prediction_type != "v_prediction":
        return 1.
    return policy.scheduler.alphas_cumprod.to(x.device)[t].sqrt().view(-1, 1, 1, 1)


weak = partial(sld, warm_up=15, safety_scale=200, threshold=0,      # in the field's comparisons
               momentum_scale=0, momentum_beta=0)
weak_20 = partial(weak, safety_scale=20)                # diffusers' SafetyConfig.WEAK
medium = sld
strong = partial(sld, warm_up=7, safety_scale=2000, threshold=.025, momentum_scale=.5,
                 momentum_beta=.7)
maximum = partial(strong, warm_up=0, safety_scale=5000, threshold=1.)
