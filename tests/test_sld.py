"""SLD against the paper's equations, written out plainly."""
import types

import pytest
import torch

import rivals
from rivals.sld import maximum

NUMBERS = {             # warm-up, safety scale, threshold, momentum scale, beta: the paper's table
    "sld-weak": (15, 200, 0, 0, 0),
    "sld-weak-20": (15, 20, 0, 0, 0),                   # diffusers' deprecated pipeline's
    "sld-medium": (10, 1000, .01, .3, .4),
    "sld-strong": (7, 2000, .025, .5, .7),
    "sld-max": (0, 5000, 1., .5, .7),
}


class Fake:
    """A policy whose network is a table: each text has its own output, a function of x and t."""
    concept = "away"

    def __init__(self, times, prediction_type="epsilon"):
        self.prediction_type = prediction_type
        self.scheduler = types.SimpleNamespace(
            timesteps=torch.tensor(times), alphas_cumprod=torch.linspace(.999, .005, 1000))
        self.words = {"": 1., "away": 2., "a": 3., "b": -4.}

    def encode(self, texts):
        return torch.tensor([self.words[text] for text in texts]).view(-1, 1, 1)

    def unet_output(self, x, t, text):
        text, t = text.view(-1, 1, 1, 1), t.view(-1, 1, 1, 1)
        return torch.sin(x * text) + t / 1000 * text


def by_hand(policy, numbers, path, texts, s):
    """The guided epsilons of a path (T, B, C, h, w), one element at a time; v is turned first."""
    warm_up, s_s, threshold, s_m, beta = numbers

    def epsilon(x, t, words):
        output = policy.unet_output(x, t, policy.encode(words))
        if policy.prediction_type == "epsilon":
            return output
        a = policy.scheduler.alphas_cumprod[t]
        return a.sqrt() * output + (1 - a).sqrt() * x
    nu, guided = torch.zeros_like(path[0]), []
    for i, t in enumerate(policy.scheduler.timesteps):
        x = path[i]
        e, e_p = epsilon(x, t, [""] * len(texts)), epsilon(x, t, texts)
        e_s = epsilon(x, t, ["away"] * len(texts))
        mu = torch.zeros_like(x)
        for where in torch.cartesian_prod(*(torch.arange(n) for n in x.shape)):
            at = tuple(where.tolist())
            if e_p[at] - e_s[at] < threshold:
                mu[at] = min(1, abs(s_s * (e_p[at] - e_s[at])))
        gamma = mu * (e_s - e) + s_m * nu
        nu = beta * nu + (1 - beta) * gamma
        guided.append(e + s * (e_p - e - (gamma if i >= warm_up else 0)))
    return guided


@pytest.mark.parametrize("name, numbers", NUMBERS.items())
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_slds_update_is_its_equations_step_by_step(name, numbers, kind):
    policy = Fake(range(981, 0, -20), kind)                         # 50 steps: warm-ups count them
    path = torch.randn(50, 2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    predict = rivals.find(rivals.GUIDES, name, "--method")(policy, ["a", "b"], 7.5)
    wanted = by_hand(policy, numbers, path, ["a", "b"], 7.5)
    for i, t in enumerate(policy.scheduler.timesteps):
        found = predict(path[i], t)
        if kind == "v_prediction":
            a = policy.scheduler.alphas_cumprod[t]
            found = a.sqrt() * found + (1 - a).sqrt() * path[i]
        assert torch.allclose(found, wanted[i], atol=1e-4), i


def test_momentum_follows_its_own_path_and_starts_anew_with_each():
    policy = Fake((801, 601, 401, 201, 1))
    x = torch.randn(5, 2, 1, 2, 2, generator=torch.Generator().manual_seed(0))

    def walk(predict):
        return [predict(x[i], t) for i, t in enumerate(policy.scheduler.timesteps)]
    first = walk(maximum(policy, ["a", "b"], 3.))
    again = walk(maximum(policy, ["a", "b"], 3.))
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    alone = maximum(policy, ["a", "b"], 3.)(x[3], policy.scheduler.timesteps[3])
    assert not torch.allclose(alone, first[3], atol=1e-4)           # without the steps before it


def test_at_a_guidance_of_one_it_still_steers():
    """The authors' pipeline leaves safety guidance out with guidance itself."""
    policy, x = Fake((801, 401)), torch.randn(1, 1, 2, 2)
    t, text = policy.scheduler.timesteps[0], policy.encode(["a"])
    found = maximum(policy, ["a"], 1)(x, t)
    own, concept = policy.unet_output(x, t, text), policy.unet_output(x, t, policy.encode(["away"]))
    empty = policy.unet_output(x, t, policy.encode([""]))
    mu = (5000 * (own - concept)).abs().clamp(max=1).where(own - concept < 1, 0.)
    assert torch.allclose(found, own - mu * (concept - empty), atol=1e-5)
    assert not torch.allclose(found, own, atol=1e-3)
