"""The soft prompt: what it changes, what it leaves alone, and the pictures it aims at."""
import re

import numpy as np
import pytest
import torch

import attack
import attacks.soft_prompt
from attacks.soft_prompt import fit, soft_encoder, soft_prompt, unsafe_latents
from attacks.tokens import generators
from ddpo import denoise, draw_noise
from model import Policy, plain
from prompts import Prompt


@pytest.fixture(scope="module")
def policy(pipeline):
    return Policy(pipeline)


@pytest.fixture
def args(pipeline):
    return attack.parse_args(["soft-prompt", "--model", pipeline, "--tokens", "3", "--tries", "2",
                              "--steps", "2", "--iterations", "60", "--lr", ".05"])


def parameters(policy):
    return [p for module in (policy.unet, policy.text_encoder) for p in module.parameters()]


def test_it_lowers_its_loss_and_touches_no_weight(policy, args, capsys, monkeypatch):
    """The network is a plain function of the text here, for a random one hardly looks at it."""
    def unet_output(self, x, t, text):
        return text.mean(1)[:, :4].view(-1, 4, 1, 1) * 5 + 0 * x
    monkeypatch.setattr(Policy, "unet_output", unet_output)
    before = [p.clone() for p in parameters(policy)]
    prompts = [Prompt("an egg"), Prompt("a large peach on a red background")]
    made = soft_prompt(policy, prompts, args)
    printed = capsys.readouterr().out
    first, last = re.search(r"iterations ([\d.]+), of the last ([\d.]+)\n", printed).groups()
    assert float(last) < float(first), printed
    assert all(torch.equal(p, old) for p, old in zip(parameters(policy), before, strict=True))
    assert all(p.grad is None for p in parameters(policy))
    assert [one.text for one in made] == prompts
    own = policy.encode(["an egg"])[0]
    assert made[0].states.shape == own.shape and not torch.allclose(made[0].states, own)


def test_soft_tokens_stand_between_the_start_and_the_prompt(policy):
    """With the embeddings of written words, the states are those of the words before the prompt."""
    words = policy.tokenizer("small cat").input_ids[1:-1]
    embeddings = policy.text_encoder.get_input_embeddings()
    soft = embeddings.weight[torch.tensor([words])]                 # (1, 2, D)
    with torch.no_grad():
        states = soft_encoder(policy, [Prompt("a dog")], soft)()
    wanted = policy.encode(["small cat a dog"])
    assert torch.allclose(states, wanted, atol=1e-5)
    assert torch.equal(embeddings(torch.tensor([words])), soft)     # the hook is gone


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_is_the_networks_own_error(policy, args, monkeypatch, kind):
    """A network that is right about every picture has a loss of 0, whatever it predicts."""
    x0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    alphas, losses = policy.scheduler.alphas_cumprod, []

    def right(self, x, t, text):
        a = alphas[t].view(-1, 1, 1, 1)
        eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
        output = eps if kind == "epsilon" else a.sqrt() * eps - (1 - a).sqrt() * x0
        return output + 0 * text.sum()                  # in the graph
    monkeypatch.setattr(Policy, "unet_output", right)
    monkeypatch.setattr(policy, "prediction_type", kind)
    args.iterations = 5
    fit(policy, policy, ["an egg", "a dog"], x0, generators(2, 0), args, losses.append)
    assert len(losses) == 5 and max(losses) < 1e-6


def test_the_aim_is_the_bases_most_nude_picture_of_each_prompt(policy, args, monkeypatch):
    prompts, scores = [Prompt("an egg"), Prompt("a dog")], iter([[.2, .9], [.5, .1]])

    def detector(pictures):
        return np.repeat(np.array(next(scores))[:, None], 18, axis=1)
    monkeypatch.setattr(attacks.soft_prompt, "Nudity", lambda device: detector)
    best = unsafe_latents(policy, prompts, args)
    schedule = policy.schedule(args.steps)
    seeds = [4_000_000, 3_000_001]                      # the second turn's, the first turn's
    noise = draw_noise(seeds, args.steps, (4, 8, 8))
    wanted = denoise(plain(policy, prompts, args.guidance), noise, schedule)
    assert torch.allclose(best, wanted, atol=1e-4)
