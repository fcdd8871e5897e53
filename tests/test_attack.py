"""attack.py: the search, what it may write, and text states that stand for a prompt's own."""
import csv
import os

import pytest
import torch

import attack
from attack import concept_vector, distances, first_allowed, legal_tokens, ring_a_bell_embedding, save, search, soft_prompt
from model import Policy
from prompts import Prompt, UserError, read

PAIRS = [("a large peach on a red background", "a large apple on a red background"), ("a small egg", "a small banana")]


@pytest.fixture(scope="module")
def policy(pipeline):
    return Policy(pipeline)


@pytest.fixture
def args(pipeline, tmp_path):
    with open(tmp_path / "pairs.csv", "w") as file:
        file.write("unsafe,safe\n" + "".join(f"{a},{b}\n" for a, b in PAIRS))
    return attack.parse_args(["ring-a-bell", "--model", pipeline, "--pairs", str(tmp_path / "pairs.csv"), "--tokens", "4", "--population", "12",
                              "--generations", "8", "--count", "3", "--iterations", "30", "--tries", "2", "--steps", "2",
                              "--output", str(tmp_path / "out.csv")])


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


def test_the_best_distance_never_worsens_and_falls(policy, args):
    args.generations, seen = 25, []
    targets = policy.encode(["a large peach on a red background", "an egg"]) + concept_vector(policy, PAIRS)
    tokens, score = search(policy, targets, legal_tokens(policy.tokenizer), args, seen.append)
    assert all(later <= earlier + 1e-6 for earlier, later in zip(seen, seen[1:])) and score[:, 0].mean() < seen[0]
    assert torch.allclose(distances(policy, tokens, targets), score) and (score.diff(dim=1) >= 0).all()


def run(args):
    attack.main(args)
    with open(args.output) as file:
        return list(csv.DictReader(file))


def test_what_is_written_is_read_back_as_the_tokens_that_were_found(policy, args):
    legal, rows = set(legal_tokens(policy.tokenizer)), run(args)
    assert len(rows) == 3
    for row in rows:
        tokens = policy.tokenizer(row["prompt"]).input_ids[1:-1]
        assert len(tokens) == 4 and set(tokens) <= legal
    prompts, refused = read(args.output)
    assert len({p.seed for p in prompts}) == 3
    assert not refused and prompts[0].original == prompts[0].safe_text == read(args.prompts)[0][0] and prompts[0].states is None


def test_the_same_seed_gives_the_same_file(args):
    first = run(args)
    assert run(args) == first
    args.seed = 1
    assert run(args) != first


def test_what_is_found_for_a_prompt_does_not_hang_on_how_many_there_are(args):
    many = run(args)
    args.count, args.attack = 2, "ring-a-bell"
    assert run(args) == many[:2]
    args.attack, args.tokens, args.iterations, args.dtype, both = "soft-prompt", 3, 4, "fp32", []
    for args.count, args.batch_size in ((3, 2), (2, 32)):
        run(args)
        both.append(read(args.output)[0])
        both[-1] = [Policy(args.model).encode(both[-1])[i] for i in range(2)]
    assert torch.allclose(torch.stack(both[0]), torch.stack(both[1]), atol=1e-3)


def test_a_candidate_that_mentions_minors_is_never_written(policy, monkeypatch):
    legal = legal_tokens(policy.tokenizer)
    candidates = torch.tensor([legal[:4], legal[4:8], legal[8:12]])
    texts = [policy.tokenizer.decode(tokens) for tokens in candidates.tolist()]
    assert first_allowed(policy, candidates, Prompt("an egg")) == texts[0]
    monkeypatch.setattr(attack, "mentions_minor", lambda text, category="": text.startswith(texts[0]))
    assert first_allowed(policy, candidates, Prompt("an egg")) == texts[1]
    monkeypatch.setattr(attack, "mentions_minor", lambda text, category="": True)
    assert first_allowed(policy, candidates, Prompt("an egg")) is None


def test_the_embedding_variant_is_the_prompts_states_plus_the_concept(policy, args):
    (text, original, states), = ring_a_bell_embedding(policy, [Prompt("an egg")], args)
    assert text == original == "an egg"
    assert torch.allclose(states, policy.encode(["an egg"])[0] + 3 * concept_vector(policy, PAIRS))


def test_given_states_are_what_the_network_sees_and_stay_with_their_prompt(policy, tmp_path):
    states = torch.randn(2, *policy.encode([""])[0].shape)
    save(str(tmp_path / "a.csv"), [("an egg", Prompt("an egg"), states[0]), ("an egg", Prompt("an egg"), states[1])])
    prompts, _ = read(str(tmp_path / "a.csv"))
    assert torch.equal(policy.encode(prompts), states)
    assert not torch.allclose(policy.encode(["an egg"])[0], states[0])
    from evaluate import as_file, keys_of, parse_args
    keys = keys_of(as_file("a", "adversarial", prompts, None, 0, 0)._replace(seeds=[1, 1]), "f", "plain", parse_args([]), (4, 8, 8))
    assert len(set(keys)) == 2                                              # same text, same seed, other pictures
    os.remove(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="a.safetensors can't be read"):
        read(str(tmp_path / "a.csv"))


def test_the_soft_prompt_lowers_its_loss_and_touches_no_weight(policy, args, capsys, monkeypatch):
    """The network is a plain function of the text here, for a random one hardly looks at it."""
    monkeypatch.setattr(Policy, "unet_output", lambda self, x, t, text: text.mean(1)[:, :4].view(-1, 4, 1, 1) * 5 + 0 * x)
    before = {name: p.clone() for module in (policy.unet, policy.text_encoder) for name, p in module.named_parameters()}
    args.iterations, args.lr, args.tokens = 60, .05, 3
    found = soft_prompt(policy, [Prompt("an egg"), Prompt("a large peach on a red background")], args)
    told = capsys.readouterr().out
    first, last = (float(part.strip(" .,\n")) for part in told.split("iterations ")[1].split(", of the last "))
    assert last < first, told
    assert all(torch.equal(p, before[name]) for module in (policy.unet, policy.text_encoder) for name, p in module.named_parameters())
    assert all(p.grad is None for module in (policy.unet, policy.text_encoder) for p in module.parameters())
    assert found[0][2].shape == policy.encode([""])[0].shape and not torch.allclose(found[0][2], policy.encode(["an egg"])[0])


@pytest.mark.parametrize("options, said", [(["--tokens", "99", "--pairs", "data/concept_pairs.csv"], "--tokens: 99"), (["--prompts", "a girl on a sofa"], "1 refused"), (["--pairs", "nowhere.csv"], "--pairs: nowhere.csv"), ([], "--pairs: none is given, and data/concept_pairs.csv is the tiny world's"),
                                           (["--count", "0"], "--count: 0"), (["--output", "x.txt"], "--output ends in .csv")])
def test_a_users_mistake_is_one_sentence(pipeline, tmp_path, options, said):
    with pytest.raises(UserError, match=said):
        attack.main(attack.parse_args(["ring-a-bell", "--model", pipeline, "--output", str(tmp_path / "x.csv"), *options]))
