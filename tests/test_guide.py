"""guide.py against the papers' equations, written out plainly."""
import types

import pytest
import torch

import guide
from guide import GUIDES, choose_guide, pooled, project_triggers, projector, sld
from model import Policy
from prompts import Prompt, UserError


class Fake:
    """A policy whose network is a table: each text has its own output, a linear function of x and t."""
    concept, prediction_type = "away", "epsilon"

    def __init__(self, times=(801, 601, 401, 201, 1)):
        self.scheduler = types.SimpleNamespace(timesteps=torch.tensor(times), alphas_cumprod=torch.linspace(.999, .005, 1000))
        self.words = {"": 1., "away": 2., "a": 3., "b": -4.}

    def encode(self, texts):
        return torch.tensor([self.words[text] for text in texts]).view(-1, 1, 1)

    def unet_output(self, x, t, text):
        return torch.sin(x * text.view(-1, 1, 1, 1)) + t.view(-1, 1, 1, 1) / 1000 * text.view(-1, 1, 1, 1)


def test_the_negative_prompt_stands_where_the_empty_one_was():
    policy, x, t = Fake(), torch.randn(2, 4, 3, 3), torch.tensor(401)
    out = lambda words: policy.unet_output(x, t, policy.encode(words))
    assert torch.allclose(GUIDES["negative"](policy, ["a", "b"], 3.)(x, t), out(["away"] * 2) + 3 * (out(["a", "b"]) - out(["away"] * 2)))


@pytest.mark.parametrize("name, numbers", [("sld-weak", (15, 200, 0, 0, 0)), ("sld-medium", (10, 1000, .01, .3, .4)),
                                           ("sld-strong", (7, 2000, .025, .5, .7)), ("sld-max", (0, 5000, 1., .5, .7))])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_slds_update_is_its_equations_step_by_step(name, numbers, kind):
    """One picture, one element at a time; for v the outputs are turned into epsilon, guided, and turned back."""
    warm_up, scale, threshold, s_m, beta = numbers
    policy = Fake(tuple(range(981, 0, -20)))                                # 50 steps: warm-ups count them
    policy.prediction_type = kind
    torch.manual_seed(0)
    path = torch.randn(50, 2, 1, 2, 2)
    predict = GUIDES[name](policy, ["a", "b"], 7.5)
    nu = torch.zeros(2, 1, 2, 2)
    for i, t in enumerate(policy.scheduler.timesteps):
        x, a = path[i], policy.scheduler.alphas_cumprod[t]
        eps = lambda words: a.sqrt() * policy.unet_output(x, t, policy.encode(words)) + (1 - a).sqrt() * x if kind == "v_prediction" \
            else policy.unet_output(x, t, policy.encode(words))
        e, e_p, e_s = eps(["", ""]), eps(["a", "b"]), eps(["away", "away"])
        mu = torch.zeros_like(x)
        for where in torch.cartesian_prod(*(torch.arange(n) for n in x.shape)):
            at = tuple(where.tolist())
            if e_p[at] - e_s[at] < threshold:
                mu[at] = min(1, abs(scale * (e_p[at] - e_s[at])))
        gamma = mu * (e_s - e) + s_m * nu
        nu = beta * nu + (1 - beta) * gamma
        wanted = e + 7.5 * (e_p - e - (gamma if i >= warm_up else 0))
        got = predict(x, t)
        got = a.sqrt() * got + (1 - a).sqrt() * x if kind == "v_prediction" else got
        assert torch.allclose(got, wanted, atol=1e-4), i


def test_sld_out_of_turn_with_its_memory_is_sld_in_turn():
    policy, x = Fake(), torch.randn(5, 2, 1, 2, 2)
    predict = sld(0, 5000, 1., .5, .7)(policy, ["a", "b"], 3.)
    in_turn = [predict(x[i], t) for i, t in enumerate(policy.scheduler.timesteps)]
    again = sld(0, 5000, 1., .5, .7)(policy, ["a", "b", "a"], 3.)
    again.recall(torch.stack([predict.memory[3][0], predict.memory[1][1], predict.memory[0][0]]))
    got = again(torch.stack([x[3, 0], x[1, 1], x[0, 0]]), policy.scheduler.timesteps[[3, 1, 0]])
    assert torch.allclose(got, torch.stack([in_turn[3][0], in_turn[1][1], in_turn[0][0]]), atol=1e-6) and predict.memory[3].abs().sum() > 0


def test_safrees_projectors_are_idempotent_and_remove_the_concept():
    concept = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    p = projector(concept)
    assert torch.allclose(p @ p, p, atol=1e-5) and torch.allclose(p @ concept.T, concept.T, atol=1e-5)
    left = torch.randn(5, 16) @ (torch.eye(16) - p)
    assert (left @ concept.T).abs().max() < 1e-5


def test_a_trigger_is_the_token_whose_absence_leads_away_from_the_concept(monkeypatch, pipeline):
    policy, d = Policy(pipeline), 8
    states = torch.randn(24, d)
    away = projector(torch.eye(d)[:1])                                      # the concept is the first axis
    ids = policy.tokenizer("a large peach on a blue background").input_ids
    without = torch.eye(d)[torch.arange(len(ids) - 2) % (d - 1) + 1] * 1.   # every blanked prompt at distance 1
    monkeypatch.setattr(guide, "pooled", lambda policy, ids: without)
    assert torch.equal(project_triggers(policy, "a large peach on a blue background", states, away, .01), states)
    without[2] *= 1.5                                                       # less the third token: further away
    changed = project_triggers(policy, "a large peach on a blue background", states, away, .01)
    other = [i for i in range(24) if i != 3]
    wanted = (torch.eye(d) - away) @ projector(without) @ states[3]
    assert torch.equal(changed[other], states[other]) and torch.allclose(changed[3], wanted, atol=1e-5) and abs(changed[3, 0]) < 1e-5


def test_pooled_is_the_encoders_own_pooling(pipeline):
    policy = Policy(pipeline)
    ids = policy.tokenizer(["a dog", "a large cat on a mat"]).input_ids
    theirs = torch.cat([policy.text_encoder(torch.tensor([one])).pooler_output for one in ids])
    assert torch.allclose(pooled(policy, ids), theirs, atol=1e-5)


def test_safree_filters_the_first_steps_and_then_gives_the_prompt_back(pipeline):
    policy, x = Policy(pipeline), torch.randn(2, 4, 8, 8)
    policy.concept, asked = "peach, egg", ["a large peach on a blue background", "an egg"]
    policy.schedule(5, 1.)
    times, plainly = policy.scheduler.timesteps, GUIDES["plain"](policy, asked, 3.)
    always = GUIDES["safree-always"](policy, asked, 3.)
    filtered = guide.safree(most=10)(policy, asked, 3.)
    assert not torch.allclose(always(x, times[-1]), plainly(x, times[-1]), atol=1e-6)
    assert torch.allclose(filtered(x, times[-1]), plainly(x, times[-1]), atol=1e-6)              # 40 of 50 steps are done, n <= 10


def test_safree_leaves_text_states_that_no_words_stand_for(pipeline):
    """A soft prompt's states are its own: their places are not the words'."""
    policy, x = Policy(pipeline), torch.randn(1, 4, 8, 8)
    policy.concept, text = "peach, egg", "a large peach on a blue background"
    policy.schedule(5, 1.)
    asked = Prompt(text, states=("file", "0", "sha"))
    policy.states[text, asked.states] = torch.randn(policy.encode([text])[0].shape)
    t = policy.scheduler.timesteps[0]
    assert torch.equal(GUIDES["safree-always"](policy, [asked], 3.)(x, t), GUIDES["plain"](policy, [asked], 3.)(x, t))


@pytest.mark.parametrize("name", list(GUIDES))
def test_every_guide_takes_a_scale_a_prompt_and_a_timestep_a_row(pipeline, name):
    policy, x = Policy(pipeline), torch.randn(2, 4, 8, 8)
    policy.concept, asked = "peach, egg", ["a large peach on a blue background", "a dog"]
    policy.schedule(5, 1.)
    t = policy.scheduler.timesteps
    one = GUIDES[name](policy, asked, 3.)(x, t[1])
    rows = GUIDES[name](policy, asked, torch.tensor([3., 3.]))(x, t[[1, 1]])
    assert one.shape == x.shape and torch.allclose(one, rows, atol=1e-5)


def test_an_unknown_guide_is_a_sentence():
    with pytest.raises(UserError, match="--guide: magic is unknown; give some of plain"):
        choose_guide("magic")
