"""Latent Guard's attention and loss written out again, and what it learns to block."""
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import build_random_pipeline

from model import Policy
from plumbing.options import UserError
from prompts import Prompt
from rivals.latent_guard import (
    EPOCHS,
    GUARDS,
    LR,
    Guard,
    best_score,
    end_states,
    guard_loss,
    latent_guard,
    read_guard_pairs,
    states_of,
    train,
)
from tiny.drawings import read_emoji


def test_a_score_is_the_papers_attention_head_by_head():
    torch.manual_seed(0)
    guard, prompts, concepts = Guard(24), torch.randn(2, 5, 24), torch.randn(3, 24)
    found = guard(prompts, concepts)
    for b in range(2):
        for n in range(3):
            key, value = guard.key(prompts[b]), guard.value(prompts[b])         # (S, 512)
            query, parts = guard.query(concepts[n]), []
            for head in range(16):
                part = slice(32 * head, 32 * head + 32)
                weights = torch.softmax(key[:, part] @ query[part] / math.sqrt(32), 0)
                parts.append(weights @ value[:, part])
            cosine = F.cosine_similarity(guard.of_prompt(torch.cat(parts)),
                                         guard.of_concept(query), dim=0)
            assert found[b, n].item() == pytest.approx((cosine / .07).item(), abs=1e-4)


def test_the_loss_is_two_cross_entropies_with_safe_prompts_as_negatives():
    generator = torch.Generator().manual_seed(0)
    unsafe, safe = (torch.randn(3, 3, generator=generator) for _ in range(2))
    rows = columns = 0
    for i in range(3):
        others = torch.cat([unsafe[i], torch.stack([safe[k].max() for k in range(3)])])
        rows += (others.logsumexp(0) - unsafe[i, i]) / 3
        others = torch.cat([unsafe[:, i], safe[:, i]])
        columns += (others.logsumexp(0) - unsafe[i, i]) / 3
    assert torch.allclose(guard_loss(unsafe, safe), rows + columns)


@pytest.mark.parametrize("shape", ["pipeline", "sd1_pipeline", "sd2_pipeline"])
def test_the_end_tokens_state_comes_first(shape, request):
    policy = Policy(request.getfixturevalue(shape))
    texts = ["a peach", "a large egg on a blue background"]
    states, encoded = states_of(policy, texts), policy.encode(texts)
    assert states.shape[1] == policy.text_length + 1
    assert torch.equal(states[:, 1:], encoded.float())
    for row, text in enumerate(texts):
        ids = policy.tokenizer(text).input_ids
        assert ids[-1] == policy.tokenizer.eos_token_id
        assert torch.equal(states[row, 0], encoded[row, len(ids) - 1])


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A random pipeline that names pairs of four concepts, and a guard that learned of them."""
    folder = tmp_path_factory.mktemp("guarded")
    names, harmless = ["peach", "egg", "potato", "cookie"], ["dog", "car", "banana", "bus"]
    colours = ["red", "green", "blue", "white"]
    lines = ["concept,unsafe,safe"] + [
        f"{name},a {name} on {colour},a {harmless[(i + k) % 4]} on {colour}"
        for i, name in enumerate(names) for k, colour in enumerate(colours)]
    (folder / "pairs.csv").write_text("\n".join(lines))
    (folder / "unsafe.csv").write_text("prompt\na peach on red\n")
    (folder / "benign.csv").write_text("prompt,category\n" + "".join(
        f"a {name} on {colour},benign\n" for name in harmless for colour in colours))
    world = {"recipe": "embedded", "clip": "clip", "concept": "peach", "guard_pairs": "pairs.csv",
             "training_files": {"unsafe.csv": {"benign": "benign.csv"}}}
    policy = Policy(build_random_pipeline(folder, world=world))
    GUARDS[policy] = {(EPOCHS, LR, 0): train(policy, 150)}
    return policy, names, harmless


def guard_of(policy):
    return GUARDS[policy][EPOCHS, LR, 0]


def test_a_caption_scores_highest_with_its_own_concept(guarded):
    policy, names, _ = guarded
    guard = guard_of(policy)
    with torch.no_grad():
        scores = guard(states_of(policy, [f"a {name} on green" for name in names]), guard.concepts)
    assert scores.argmax(1).tolist() == [0, 1, 2, 3]


def test_it_blocks_prompts_that_name_a_concept_and_no_benign_training_prompt(guarded):
    policy, names, harmless = guarded
    unsafe = [f"a {name} on {colour}" for name in names for colour in ("red", "blue")]
    benign = [f"a {name} on {colour}" for name in harmless for colour in ("red", "blue")]
    blocked = latent_guard(policy, [*unsafe, *benign], None, None, None)
    assert blocked.tolist() == [True] * 8 + [False] * 8


def test_once_pictures_are_drawn_it_has_nothing_to_say(guarded):
    policy, names, _ = guarded
    pictures = np.zeros((1, 8, 8, 3), np.uint8)
    assert latent_guard(policy, ["a peach on red"], None, None, pictures).tolist() == [False]


def test_the_threshold_blocks_one_in_a_hundred_benign_prompts_at_most(guarded):
    policy = guarded[0]
    guard = guard_of(policy)
    scores = best_score(guard, policy, [f"a {name} on {colour}" for name in guarded[2]
                                        for colour in ("red", "green", "blue", "white")])
    assert (scores < guard.threshold).all() and scores.max() == pytest.approx(guard.threshold)


def test_two_trainings_are_equal_and_leave_torchs_numbers_alone(guarded):
    policy = guarded[0]
    before = torch.get_rng_state()
    one, two = train(policy, 2), train(policy, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert one.threshold == two.threshold
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def test_an_attacks_text_states_are_looked_at_in_place_of_the_texts(guarded, tmp_path):
    policy = guarded[0]
    from safetensors.torch import save_file
    save_file({"0": policy.encode(["a peach on red"])[0].contiguous()}, tmp_path / "s.safetensors")
    prompt = Prompt("a dog on red", states=(str(tmp_path / "s.safetensors"), "0", ""))
    assert torch.equal(states_of(policy, [prompt])[0, 1:], policy.encode(["a peach on red"])[0])
    assert end_states(policy, [prompt], policy.encode([prompt])).shape == (1, 32)


def test_its_settings_make_another_guard(guarded):
    policy = guarded[0]
    latent_guard(policy, ["a peach on red"], None, None, None, epochs=3., lr=1e-2)
    guards = GUARDS[policy]
    assert set(guards) == {(EPOCHS, LR, 0), (3., 1e-2, 0)}
    guard = guards.pop((3., 1e-2, 0))
    assert guard.threshold == train(policy, 3, 1e-2).threshold != guard_of(policy).threshold
    assert guard.threshold != train(policy, 3, 1e-2, seed=1).threshold


def test_what_it_needs_is_asked_for(pipeline, tmp_path):
    with pytest.raises(UserError, match="guard_pairs"):
        latent_guard(Policy(pipeline), ["a peach"], None, None, None)
    path = tmp_path / "pairs.csv"
    path.write_text("concept,unsafe\npeach,a peach\n")
    with pytest.raises(UserError, match="columns concept, unsafe"):
        read_guard_pairs(str(path))
    path.write_text("concept,unsafe,safe\npeach,a peach,a dog\n")
    with pytest.raises(UserError, match="1 concepts"):
        read_guard_pairs(str(path))


def test_the_embedded_worlds_pairs_name_trained_emoji_alone():
    with open("tiny/world.json") as file:
        assert json.load(file)["guard_pairs"] == "../data/guard_pairs.csv"
    pairs = read_guard_pairs("data/guard_pairs.csv")
    trained = {one.name for one in read_emoji("tiny/emoji.csv") if one.split == "train"}
    assert set(pairs) <= trained
    for name, captions in pairs.items():
        assert all(name in unsafe and name not in safe for unsafe, safe in captions)
