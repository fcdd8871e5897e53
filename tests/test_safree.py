"""SAFREE's projections against the paper's formulas, and when its text is used."""
import pytest
import torch

import rivals.safree
from model import Policy, plain
from prompts import Prompt
from rivals.safree import pooled, project_triggers, projector, safree, safree_always

PEACH = "a large peach on a blue background"


@pytest.fixture
def policy(pipeline):
    policy = Policy(pipeline)
    policy.schedule(5, 1.)
    return policy


def test_the_projectors_are_idempotent_and_remove_the_concept():
    concept = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    p = projector(concept)
    assert torch.allclose(p @ p, p, atol=1e-5)
    assert torch.allclose(p @ concept.T, concept.T, atol=1e-5)
    left = torch.randn(5, 16) @ (torch.eye(16) - p)
    assert (left @ concept.T).abs().max() < 1e-5


def test_a_trigger_is_the_token_whose_absence_leads_away_from_the_concept(monkeypatch, policy):
    width = 8
    states = torch.randn(24, width)
    concept = projector(torch.eye(width)[:1])                       # the first axis
    count = len(policy.tokenizer(PEACH).input_ids) - 2
    axes = torch.arange(count) % (width - 1) + 1
    without = torch.eye(width)[axes] * 1.                           # each at distance 1
    monkeypatch.setattr(rivals.safree, "pooled", lambda policy, ids: without)
    assert torch.equal(project_triggers(policy, PEACH, states, concept, .01), states)

    without[2] *= 1.5                                               # the third token's: further
    changed = project_triggers(policy, PEACH, states, concept, .01)
    others = [i for i in range(24) if i != 3]
    wanted = (torch.eye(width) - concept) @ projector(without) @ states[3]
    assert torch.equal(changed[others], states[others])
    assert torch.allclose(changed[3], wanted, atol=1e-5) and abs(changed[3, 0]) < 1e-5


def test_pooled_is_the_encoders_own_pooling(policy):
    ids = policy.tokenizer(["a dog", "a large cat on a mat"]).input_ids
    with torch.no_grad():
        theirs = [policy.text_encoder(torch.tensor([one])).pooler_output for one in ids]
    assert torch.allclose(pooled(policy, ids), torch.cat(theirs), atol=1e-5)


def test_the_changed_text_is_used_at_first_and_then_the_prompts_own(policy):
    x, prompts, times = torch.randn(2, 4, 8, 8), [PEACH, "an egg"], policy.scheduler.timesteps
    own, always = plain(policy, prompts, 3.), safree_always(policy, prompts, 3.)
    filtered = safree(policy, prompts, 3.)
    with torch.no_grad():
        assert torch.allclose(filtered(x, times[0]), always(x, times[0]), atol=1e-6)
        assert not torch.allclose(always(x, times[-1]), own(x, times[-1]), atol=1e-6)
        # 40 of 50 steps are done, more than the filter ever has
        assert torch.allclose(filtered(x, times[-1]), own(x, times[-1]), atol=1e-6)


def test_the_filter_has_ten_steps_of_fifty_by_the_change(policy, monkeypatch):
    """n = round(10 sigmoid(5 (10 beta - 5.333))), beta 1 - the mean cosine."""
    x, prompts = torch.randn(2, 4, 8, 8), [PEACH, "an egg"]
    text = policy.encode(prompts)
    far = torch.stack([-text[0], text[1]])              # beta 2 -> 10 steps; beta 0 -> none but 0
    monkeypatch.setattr(rivals.safree, "safe_states", lambda *_: far)
    policy.schedule(50)
    with torch.no_grad():
        predict = safree(policy, prompts, 3.)
        for done, is_used in ((0, True), (10, True), (11, False)):
            t = policy.scheduler.timesteps[done]
            own = plain(policy, prompts, 3.)(x, t)
            found = predict(x, t)
            assert torch.allclose(found[0], own[0], atol=1e-6) != is_used, done
            assert torch.allclose(found[1], own[1], atol=1e-6)


def test_text_states_that_no_words_stand_for_stay_as_they_are(policy):
    """A soft prompt's states are its own: their places are not the words'."""
    x, prompt = torch.randn(1, 4, 8, 8), Prompt(PEACH, states=("file", "0", "sha"))
    policy.states[PEACH, prompt.states] = torch.randn(policy.encode([PEACH])[0].shape)
    t = policy.scheduler.timesteps[0]
    with torch.no_grad():
        for guide in (safree, safree_always):
            found = guide(policy, [prompt], 3.)(x, t)
            assert torch.equal(found, plain(policy, [prompt], 3.)(x, t))
