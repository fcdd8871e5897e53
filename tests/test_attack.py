"""attack.py: the files it writes, what they are made of, and a user's mistakes."""
import csv
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import attack
from attacks import Adversarial, Attack
from attacks.tokens import legal_tokens
from model import Policy
from plumbing.options import UserError
from plumbing.worlds import TrainingFile, World
from prompts import Prompt, read

PROMPTS = "prompt,category\n{}".format("".join(
    f"{text},unsafe\n" for text in ("a large peach", "a small egg", "an egg on a red background")))


@pytest.fixture
def options(pipeline, tmp_path):
    """options(ATTACK, more...) -> args of a small attack on three prompts."""
    (tmp_path / "pairs.csv").write_text("unsafe,safe\na large peach,a large apple\nan egg,a cup\n")
    (tmp_path / "prompts.csv").write_text(PROMPTS)

    def make(name, *more):
        own = {
            "ring-a-bell": ["--pairs", str(tmp_path / "pairs.csv"), "--tokens", "4",
                            "--population", "12", "--generations", "8"],
            "ring-a-bell-embedding": ["--pairs", str(tmp_path / "pairs.csv")],
            "soft-prompt": ["--tokens", "4", "--iterations", "4", "--tries", "2", "--steps", "2",
                            "--dtype", "fp32"],
        }
        return attack.parse_args([
            name, "--model", pipeline, "--prompts", str(tmp_path / "prompts.csv"), *own[name],
            "--count", "3", "--output", str(tmp_path / "out.csv"), *more])
    return make


def rows_of(args):
    attack.main(args)
    with open(args.output) as file:
        return list(csv.DictReader(file))


# ---- what is written -----------------------------------------------------------------------------

def test_what_is_written_is_read_back_as_the_tokens_that_were_found(pipeline, options):
    args, policy = options("ring-a-bell"), Policy(pipeline)
    legal, rows = set(legal_tokens(policy.tokenizer)), rows_of(args)
    assert len(rows) == 3
    for row in rows:
        tokens = policy.tokenizer(row["prompt"]).input_ids[1:-1]
        assert len(tokens) == 4 and set(tokens) <= legal
    prompts, refused = read(args.output)
    assert not refused and len({p.seed for p in prompts}) == 3
    assert prompts[0].original == prompts[0].safe_text == "a large peach"
    assert prompts[0].category == "unsafe" and prompts[0].states is None


def test_the_same_seed_gives_the_same_file(options):
    first = rows_of(options("ring-a-bell"))
    assert rows_of(options("ring-a-bell")) == first
    assert rows_of(options("ring-a-bell", "--seed", "1")) != first


def test_what_is_made_of_a_prompt_does_not_depend_on_how_many_there_are(pipeline, options):
    many = rows_of(options("ring-a-bell"))
    assert rows_of(options("ring-a-bell", "--count", "2")) == many[:2]
    both = []
    for count, batch_size in (("3", "2"), ("2", "32")):
        args = options("soft-prompt", "--count", count, "--batch-size", batch_size)
        rows_of(args)
        both.append(Policy(pipeline).encode(read(args.output)[0])[:2])
    assert torch.allclose(*both, atol=1e-3)


def test_prompts_of_several_files_come_in_turn_each_with_a_seed_of_its_own(options, tmp_path):
    (tmp_path / "more.txt").write_text("a full moon\n")
    first = str(tmp_path / "prompts.csv")
    args = options("ring-a-bell-embedding", "--prompts", first, str(tmp_path / "more.txt"),
                   "--count", "6")
    prompts, _ = rows_of(args), read(args.output)[0]
    assert [row["original"] for row in prompts] == [
        "a large peach", "a small egg", "an egg on a red background", "a full moon",
        "a large peach", "a small egg"]
    assert [int(row["seed"]) for row in prompts] == [1_000_000 + i for i in range(6)]


def test_given_states_are_what_the_network_sees_and_stay_with_their_prompt(pipeline, tmp_path):
    policy, path = Policy(pipeline), str(tmp_path / "a.csv")
    states = torch.randn(2, *policy.encode([""])[0].shape)
    attack.save_prompts(path, [Adversarial("an egg", Prompt("an egg"), own) for own in states])
    prompts, _ = read(path)
    assert torch.equal(policy.encode(prompts), states)
    assert not torch.allclose(policy.encode(["an egg"])[0], states[0])
    assert prompts[0].states != prompts[1].states       # same text, other pictures
    os.remove(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="a.safetensors can't be read"):
        read(path)


def test_a_method_in_the_checkpoints_name_is_passed_over(pipeline, options, monkeypatch):
    parts = []

    def run(policy, prompts, args):
        parts.append(args.model)
        return [Adversarial("an egg", prompt) for prompt in prompts]
    monkeypatch.setattr(attack.rivals, "find", lambda *_: Attack(run, "ours"))
    args = options("ring-a-bell", "--checkpoint", f"{pipeline}+sld-medium")
    args.model = None
    attack.main(args)
    assert parts == [pipeline]


# ---- settings and prompts ------------------------------------------------------------------------

def test_an_attacks_settings_are_the_worlds_or_the_authors(pipeline, foreign_pipeline):
    own = attack.parse_args(["ring-a-bell", "--model", pipeline])
    assert (own.tokens, own.population, own.generations) == (16, 50, 120)
    assert (own.steps, own.guidance, own.recipe) == (5, 2., "embedded")
    assert own.output == os.path.join("out", "ring-a-bell.csv")
    theirs = attack.parse_args(["ring-a-bell", "--model", foreign_pipeline])
    assert (theirs.tokens, theirs.population, theirs.generations) == (16, 200, 3000)
    assert (theirs.steps, theirs.guidance, theirs.recipe) == (50, 5., "stable_diffusion")
    soft = attack.parse_args(["soft-prompt", "--model", pipeline])
    assert (soft.tokens, soft.iterations, soft.lr, soft.batch_size) == (5, 150, .01, 64)
    assert attack.parse_args(["soft-prompt", "--model", pipeline, "--lr", "1"]).lr == 1


def test_the_recipe_is_the_checkpoints_own_or_its_bases(foreign_pipeline, tmp_path):
    run = {"model": foreign_pipeline}
    (tmp_path / "args.json").write_text(json.dumps(run))
    command = ["soft-prompt", "--checkpoint", f"{tmp_path}+negative:skin"]
    args = attack.parse_args(command)
    assert (args.recipe, args.steps, args.lr) == ("stable_diffusion", 50, .01)
    (tmp_path / "args.json").write_text(json.dumps({**run, "recipe": "reference", "steps": 20}))
    args = attack.parse_args(command)                   # as that very run was drawn
    assert (args.recipe, args.steps, args.lr) == ("reference", 20, .01)


def test_what_is_attacked_by_default_is_the_first_held_out_file_that_is_not_benign(tmp_path):
    for name in ("benign", "unsafe"):
        (tmp_path / f"{name}.csv").write_text(f"prompt,category\nan egg,{name}\n")
    files = [str(tmp_path / "benign.csv"), str(tmp_path / "unsafe.csv")]
    world = World("folder", training_files=[TrainingFile("train.csv", held_out=files)])
    assert attack.held_out_file(world) == files[1]
    with pytest.raises(UserError, match="--prompts: none is given, and folder has no world.json"):
        attack.held_out_file(World("folder"))


# ---- a user's mistakes ---------------------------------------------------------------------------

@pytest.mark.parametrize("more, message", [
    (["--tokens", "99"], "--tokens: 99 is given; this model's texts leave room for 21"),
    (["--prompts", "a girl on a sofa"], "1 refused"),
    (["--pairs", "nowhere.csv"], "--pairs: the file nowhere.csv does not exist"),
    (["--output", "x.txt"], "--output: x.txt is given; its name must end in .csv"),
])
def test_a_users_mistake_is_one_sentence(options, more, message):
    with pytest.raises(UserError, match=message):
        attack.main(options("ring-a-bell", *more))


def test_without_pairs_the_models_own_are_taken_if_it_has_any(pipeline, options, monkeypatch):
    args = options("ring-a-bell")
    args.pairs = None
    with pytest.raises(UserError, match="--pairs: none is given, and .* names any; give a CSV"):
        attack.main(args)
    world = World(pipeline, concept_pairs="nowhere.csv")
    monkeypatch.setattr(attack, "read_world", lambda model: world)
    with pytest.raises(UserError, match="--pairs: the file nowhere.csv does not exist"):
        attack.main(args)


@pytest.mark.parametrize("more, message", [
    (["--count", "0"], "--count: 0 is given; a whole number of 1 or more is needed"),
    (["--population", "3"], "--population: 3 is given; a whole number of 4 or more is needed"),
    (["--lr", "0"], "--lr: 0 is given; a number above 0 is needed"),
    (["--iterations", "5"], "--iterations: ring-a-bell does not use it; leave it out"),
])
def test_a_wrong_option_is_one_sentence(options, capsys, more, message):
    with pytest.raises(SystemExit) as ended:
        options("ring-a-bell", *more)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and error.count("\n") == 1


def test_help_answers_within_a_second():
    began = time.time()
    subprocess.run([sys.executable, f"{ROOT}/attack.py", "--help"], check=True, capture_output=True)
    assert time.time() - began < 1


def test_words_in_a_checkpoints_name_that_mention_minors_are_refused(pipeline, tmp_path):
    options = ["soft-prompt", "--model", pipeline, "--prompts", "a dog", "--output",
               str(tmp_path / "x.csv"), "--checkpoint", "base+negative:young girl"]
    with pytest.raises(UserError, match="--checkpoint: 'young girl' mentions minors"):
        attack.main(attack.parse_args(options))
