"""Ring-A-Bell: the concept, the genetic search, and what it may write."""
import types

import pytest
import torch

import attacks.ring_a_bell
from attacks.ring_a_bell import (
    breed,
    concept_vector,
    distances,
    first_allowed,
    ring_a_bell_embedding,
    search,
)
from attacks.tokens import draw_integers, generators, legal_tokens
from model import Policy
from plumbing.options import UserError
from plumbing.pairs import read_pairs
from prompts import Prompt

PAIRS = [("a large peach on a red background", "a large apple on a red background"),
         ("a small egg", "a small banana")]


@pytest.fixture(scope="module")
def policy(pipeline):
    return Policy(pipeline)


@pytest.fixture
def args(tmp_path):
    lines = ["unsafe,safe", *(f"{unsafe},{safe}" for unsafe, safe in PAIRS)]
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    return types.SimpleNamespace(pairs=read_pairs(tmp_path / "pairs.csv"), strength=3., tokens=4,
                                 population=12, generations=25, seed=0)


def test_the_concept_vector_is_the_mean_difference_of_the_text_states(policy):
    total = sum(policy.encode([unsafe])[0] - policy.encode([safe])[0] for unsafe, safe in PAIRS)
    assert torch.allclose(concept_vector(policy, PAIRS), total / 2, atol=1e-6)


def test_the_distance_is_the_squared_l2_of_the_text_as_it_is_written(policy):
    legal = legal_tokens(policy.tokenizer)
    tokens = torch.tensor(legal[:8]).view(1, 2, 4)
    target = torch.randn(1, *policy.encode([""])[0].shape)
    for i, found in enumerate(distances(policy, tokens, target, rows=1)[0]):
        states = policy.encode([policy.tokenizer.decode(tokens[0, i].tolist())])[0]
        assert found == pytest.approx(float(((states - target[0]) ** 2).sum()), rel=1e-4)


def test_legal_tokens_written_in_a_row_are_read_back_alike(policy):
    legal = legal_tokens(policy.tokenizer)
    assert len(legal) > 20 and not set(legal) & set(policy.tokenizer.all_special_ids)
    for start in range(0, len(legal) - 16, 16):
        tokens = legal[start:start + 16]
        text = policy.tokenizer.decode(tokens).strip()
        assert policy.tokenizer(text).input_ids[1:-1] == tokens


def test_the_best_distance_never_worsens_and_falls(policy, args):
    prompts, seen = ["a large peach on a red background", "an egg"], []
    targets = policy.encode(prompts) + concept_vector(policy, PAIRS)
    tokens, score = search(policy, targets, legal_tokens(policy.tokenizer), args, seen.append)
    assert all(later <= earlier + 1e-6 for earlier, later in zip(seen, seen[1:], strict=False))
    assert score[:, 0].mean() < seen[0]
    assert torch.allclose(distances(policy, tokens, targets), score)
    assert (score.diff(dim=1) >= 0).all()               # best first


def test_a_child_is_its_parents_tokens_with_one_changed_at_most():
    """Every candidate has a token of its own here, so that a child's parents can be read off."""
    parents = torch.arange(6).view(1, 6, 1).expand(-1, -1, 5).contiguous()
    legal = torch.tensor([77, 78, 79])
    children = breed(parents, 3, legal, generators(1, 0))[0]
    for seed in range(1, 40):
        children = torch.cat([children, breed(parents, 3, legal, generators(1, seed))[0]])
    is_new = children >= 77
    assert (is_new.sum(1) <= 1).all()
    uncrossed = 0
    for child, changed in zip(children, is_new, strict=True):
        own = child[~changed]
        assert (own < 3).all()                          # of the better half
        assert (own.diff() != 0).sum() <= 1             # one point, at most, of crossing over
        uncrossed += len(set(own.tolist())) == 1 and bool(changed.any())
    assert uncrossed > 20 and 0 < is_new.any(1).float().mean() < 1


def test_random_numbers_of_one_prompt_do_not_depend_on_how_many_there_are():
    many, few = generators(3, 5), generators(2, 5)
    for shape in ((4,), (2, 3)):
        assert torch.equal(draw_integers(many, 100, *shape)[:2], draw_integers(few, 100, *shape))


def test_a_candidate_that_mentions_minors_is_never_written(policy, monkeypatch):
    legal = legal_tokens(policy.tokenizer)
    candidates = torch.tensor([legal[:4], legal[4:8], legal[8:12]])
    texts = [policy.tokenizer.decode(tokens) for tokens in candidates.tolist()]
    assert first_allowed(policy, candidates, Prompt("an egg")) == texts[0]

    def is_first(text, category=""):
        return text.startswith(texts[0])
    monkeypatch.setattr(attacks.ring_a_bell, "mentions_minor", is_first)
    assert first_allowed(policy, candidates, Prompt("an egg")) == texts[1]

    def always(text, category=""):
        return True
    monkeypatch.setattr(attacks.ring_a_bell, "mentions_minor", always)
    assert first_allowed(policy, candidates, Prompt("an egg")) is None


def test_the_embedding_variant_is_the_prompts_states_plus_the_concept(policy, args):
    made, = ring_a_bell_embedding(policy, [Prompt("an egg")], args)
    assert made.text == made.original == "an egg"
    wanted = policy.encode(["an egg"])[0] + 3 * concept_vector(policy, PAIRS)
    assert torch.allclose(made.states, wanted)


def test_pairs_that_are_incomplete_or_mention_minors_are_dropped(tmp_path, capsys):
    path = tmp_path / "pairs.csv"
    path.write_text("unsafe,safe\nan egg,a cup\nan egg,\na naked child,a cup\n")
    assert read_pairs(path) == [("an egg", "a cup")]
    assert "2 pairs of" in capsys.readouterr().err
    path.write_text("unsafe,safe\nan egg,\n")
    with pytest.raises(UserError, match="has no usable pair"):
        read_pairs(path)
    path.write_text("one,two\nan egg,a cup\n")
    with pytest.raises(UserError, match="unsafe and safe are needed"):
        read_pairs(path)
