"""SAFREE against the paper's formulas and the release's negative prompt, each written out again."""
import pytest
import torch

import rivals.safree
from model import Policy
from prompts import Prompt
from rivals.safree import pooled, project_prompt, projector, safree, safree_always, safree_formula

PEACH = "a large peach on a blue background"
CONCEPT = ["peach", "egg"]                              # the random pipeline's


@pytest.fixture
def policy(pipeline):
    policy = Policy(pipeline)
    policy.schedule(50, 1.)
    return policy


# ---- by hand: no call into what is tested --------------------------------------------------------

def onto(rows):
    """The projector onto the span of rows (n, D), by QR in float64."""
    q = torch.linalg.qr(rows.double().T).Q
    return q @ q.T


@torch.no_grad()
def text_embeddings(policy, texts):
    """CLIP's pooled embedding of each list of tokens (n, D)."""
    return torch.cat([policy.text_encoder(torch.tensor([ids])).pooler_output for ids in texts])


@torch.no_grad()
def states_of(policy, text):
    """A text's states (L, D), padded to the encoder's length."""
    ids = policy.tokenizer([text], padding="max_length", truncation=True, max_length=24,
                           return_tensors="pt").input_ids
    return policy.text_encoder(ids)[0][0]


def by_hand(policy, text):
    """beta, the steps n and the changed states of a prompt, from section 3's formulas."""
    ids, e = policy.tokenizer(text).input_ids, states_of(policy, text).double()
    p_c = onto(text_embeddings(policy, policy.tokenizer(CONCEPT).input_ids))
    masked = [[*ids[:i], 0, *ids[i + 1:]] for i in range(1, len(ids) - 1)]
    p_i = text_embeddings(policy, masked).double()
    away = torch.eye(len(p_c)).double() - p_c
    moved = e @ (away @ onto(p_i)).T                                # (I - P_c) P_m e, every token
    cosines = [torch.dot(moved[k], e[k]) / moved[k].norm() / e[k].norm() for k in range(len(ids))]
    beta = 1 - sum(cosines) / len(ids)
    n = round((10 * torch.sigmoid(2 * 2.5 * (10 * beta - 5.333))).item())
    d, new = (p_i @ away.T).norm(dim=1), e.clone()
    for k in range(len(d)):
        if d[k] >= 1.01 * (d.sum() - d[k]) / (len(d) - 1):
            new[k + 1] = moved[k + 1]
    return beta.item(), n, new.float()


def guided_by_hand(policy, x, t, states, away, s):
    """e(away) + s (e(prompt) - e(away)), away a text."""
    with torch.no_grad():
        own = policy.unet(x, t, states[None]).sample
        other = policy.unet(x, t, states_of(policy, away)[None]).sample
    return other + s * (own - other)


# ---- the projector -------------------------------------------------------------------------------

def ill_conditioned(smallest):
    """75 x 768 with singular values from 1 to `smallest`."""
    q = torch.linalg.qr(torch.randn(768, 75).double()).Q
    return (torch.linalg.qr(torch.randn(75, 75).double()).Q
            @ torch.diag(torch.logspace(0, smallest, 75).double()) @ q.T)


@pytest.mark.parametrize("rows", [
    lambda: torch.randn(77, 768),
    lambda: torch.randn(1, 768) + .01 * torch.randn(75, 768),       # as prompts less a token are
    lambda: ill_conditioned(-3),
    lambda: ill_conditioned(-5),
], ids=["random", "alike", "condition 1e3", "condition 1e5"])
def test_the_projector_is_qrs_at_77_tokens_of_clip_ls_width(rows):
    torch.manual_seed(0)
    rows = rows().float()
    assert (projector(rows) - onto(rows)).abs().max() < 1e-5


def test_a_direction_that_comes_twice_counts_once():
    torch.manual_seed(0)
    rows = torch.randn(3, 768)
    twice = torch.cat([rows, rows[:1]])
    assert (projector(twice) - onto(rows)).abs().max() < 1e-5
    assert abs(projector(twice).trace() - 3) < 1e-4


# ---- which tokens --------------------------------------------------------------------------------

def test_a_trigger_is_the_token_whose_absence_leads_away_from_the_concept(monkeypatch, policy):
    width = 8
    states = torch.randn(24, width)
    concept = onto(torch.eye(width)[:1]).float()                    # the first axis
    ids = policy.tokenizer(PEACH).input_ids
    axes = torch.arange(len(ids) - 2) % (width - 1) + 1
    without = torch.eye(width)[axes] * 1.                           # each at distance 1
    monkeypatch.setattr(rivals.safree, "pooled", lambda policy, ids: without)
    assert torch.equal(project_prompt(policy, ids, states, concept)[0], states)

    without[2] *= 1.5                                               # the third token's: further
    found = project_prompt(policy, ids, states, concept)[0]
    others = [i for i in range(24) if i != 3]
    p_m = torch.diag((torch.arange(width) > 0).float())             # all axes but the first
    assert torch.equal(found[others], states[others])
    assert torch.allclose(found[3], p_m @ states[3], atol=1e-5)


def test_pooled_is_the_encoders_own_pooling(policy):
    ids = policy.tokenizer(["a dog", "a large cat on a mat"]).input_ids
    assert torch.allclose(pooled(policy, ids), text_embeddings(policy, ids), atol=1e-5)


@pytest.mark.parametrize("text", [PEACH, "an egg", "two dogs and a very large round orange cat"])
def test_beta_and_the_changed_states_are_the_papers(policy, text):
    """beta is over the prompt's own tokens, and as if every one of them were a trigger."""
    beta, _, states = by_hand(policy, text)
    concept = onto(text_embeddings(policy, policy.tokenizer(CONCEPT).input_ids)).float()
    ids = policy.tokenizer(text).input_ids
    found, found_beta = project_prompt(policy, ids, states_of(policy, text), concept)
    assert abs(found_beta - beta) < 1e-4
    assert torch.allclose(found, states, atol=1e-4)


# ---- the guides ----------------------------------------------------------------------------------

@pytest.mark.parametrize("guide, away, has_filter", [
    (safree, "peach, egg", True), (safree_formula, "", True), (safree_always, "peach, egg", False)])
def test_the_changed_text_has_steps_0_to_n_against_the_negative_prompt(
        policy, guide, away, has_filter):
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    texts = [PEACH, "two dogs and a very large round orange cat"]
    with torch.no_grad():
        predict = guide(policy, texts, 3.)
        for row, text in enumerate(texts):
            _, n, states = by_hand(policy, text)
            assert not torch.allclose(states, states_of(policy, text), atol=1e-3)
            for done in (0, n, n + 1, 49):
                t = policy.scheduler.timesteps[done]
                used = states if done <= n or not has_filter else states_of(policy, text)
                wanted = guided_by_hand(policy, x[row:row + 1], t, used, away, 3.)
                assert torch.allclose(predict(x, t)[row], wanted[0], atol=1e-4), (text, done)


def test_the_filter_has_up_to_ten_steps_of_fifty_by_beta(policy, monkeypatch):
    """n = round(10 sigmoid(5 (10 beta - 5.333))): 10 of beta 2, none but step 0 of beta 0."""
    x, texts = torch.randn(2, 4, 8, 8), [PEACH, "an egg"]
    far = torch.stack([-states_of(policy, text) for text in texts])
    monkeypatch.setattr(rivals.safree, "project_prompts", lambda *_: (far, torch.tensor([2., 0.])))
    with torch.no_grad():
        predict = safree_formula(policy, texts, 3.)
        for done, are_used in ((0, [True, True]), (1, [True, False]), (10, [True, False]),
                               (11, [False, False])):
            t = policy.scheduler.timesteps[done]
            for row, is_used in enumerate(are_used):
                states = states_of(policy, texts[row])
                wanted = guided_by_hand(policy, x[row:row + 1], t, -states if is_used else states,
                                        "", 3.)
                assert torch.allclose(predict(x, t)[row], wanted[0], atol=1e-4), (done, row)


def test_a_prompt_of_one_word_has_the_negative_prompt_alone(policy):
    x, t = torch.randn(1, 4, 8, 8), policy.scheduler.timesteps[0]
    with torch.no_grad():
        found = safree(policy, ["peach"], 3.)(x, t)
        nothing = safree_formula(policy, [""], 3.)(x, t)
    states = states_of(policy, "peach")
    wanted = guided_by_hand(policy, x, t, states, "peach, egg", 3.)
    assert torch.allclose(found, wanted, atol=1e-4)
    wanted = guided_by_hand(policy, x, t, states_of(policy, ""), "", 3.)
    assert torch.allclose(nothing, wanted, atol=1e-4)


def test_a_prompt_over_the_limit_is_measured_with_its_end_token(policy, monkeypatch):
    seen = []
    monkeypatch.setattr(rivals.safree, "pooled",
                        lambda policy, ids: seen.append(ids) or pooled(policy, ids))
    with torch.no_grad():
        found = safree(policy, ["a large dog " * 20], 3.)(
            torch.randn(1, 4, 8, 8), policy.scheduler.timesteps[0])
    assert torch.isfinite(found).all()
    assert len(seen[1]) == 22                                       # 24 places less start and end
    assert all(len(ids) == 24 and ids[-1] == policy.tokenizer.eos_token_id for ids in seen[1])


def test_without_guidance_there_is_no_negative_prompt(policy):
    x, t = torch.randn(1, 4, 8, 8), policy.scheduler.timesteps[0]
    states = by_hand(policy, PEACH)[2]
    with torch.no_grad():
        wanted = policy.unet(x, t, states[None]).sample
        assert torch.allclose(safree(policy, [PEACH], 1)(x, t), wanted, atol=1e-4)


def test_a_concept_of_several_spellings_is_one_list_of_words(policy):
    x, t = torch.randn(1, 4, 8, 8), policy.scheduler.timesteps[0]
    with torch.no_grad():
        wanted = safree(policy, [PEACH], 3.)(x, t)
        policy.concept = " peach,egg, peach,"
        assert torch.allclose(safree(policy, [PEACH], 3.)(x, t), wanted, atol=1e-5)


def test_text_states_that_no_words_stand_for_stay_as_they_are(policy):
    """A soft prompt's states are its own: their places are not the words'."""
    x, prompt = torch.randn(1, 4, 8, 8), Prompt(PEACH, states=("file", "0", "sha"))
    states = policy.states[PEACH, prompt.states] = torch.randn(states_of(policy, PEACH).shape)
    t = policy.scheduler.timesteps[0]
    for guide, away in ((safree, "peach, egg"), (safree_formula, ""),
                        (safree_always, "peach, egg")):
        with torch.no_grad():
            found = guide(policy, [prompt], 3.)(x, t)
        wanted = guided_by_hand(policy, x, t, states, away, 3.)
        assert torch.allclose(found, wanted, atol=1e-4)
