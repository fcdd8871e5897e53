"""Rivals and attacks by their names: each is where the registry says, and of its kind."""
import inspect

import pytest
import torch

import rivals
from attacks import ATTACKS, Attack
from model import Policy
from plumbing.options import UserError
from rivals.guiding import concept_words, steps_done

TABLES = {"GUIDES": rivals.GUIDES, "SAMPLERS": rivals.SAMPLERS, "BLOCKERS": rivals.BLOCKERS,
          "EDITS": rivals.EDITS, "ATTACKS": ATTACKS}
SIGNATURES = {
    "GUIDES": ["policy", "prompts", "scale"],
    "SAMPLERS": ["policy", "prompts", "noise", "schedule", "scale", "start"],
    "BLOCKERS": ["policy", "prompts", "noise", "draw", "pictures"],
}
ENTRIES = [(kind, name) for kind, table in TABLES.items() for name in table]


@pytest.mark.parametrize("kind, name", ENTRIES)
def test_every_name_leads_to_a_rival_with_its_kinds_signature(kind, name):
    rival = rivals.find(TABLES[kind], name, "--method")
    if kind == "EDITS":
        assert isinstance(rival, rivals.Edit) and rival.paper
        assert list(inspect.signature(rival.step).parameters) == ["job", "prompts", "rng"]
    elif kind == "ATTACKS":
        assert isinstance(rival, Attack) and rival.paper
        assert list(inspect.signature(rival.run).parameters) == ["policy", "prompts", "args"]
    else:
        wanted = SIGNATURES[kind]
        assert list(inspect.signature(rival).parameters)[:len(wanted)] == wanted


@pytest.mark.parametrize("kind, name", ENTRIES)
def test_every_file_opens_with_a_docstring(kind, name):
    rival = rivals.find(TABLES[kind], name, "--method")
    assert inspect.getmodule(getattr(rival, "step", getattr(rival, "run", rival))).__doc__


@pytest.mark.parametrize("name", list(rivals.GUIDES))
def test_every_guide_takes_a_scale_per_prompt_and_a_timestep_per_row(pipeline, name):
    policy, x = Policy(pipeline), torch.randn(2, 4, 8, 8)
    policy.schedule(5, 1.)
    guide = rivals.find(rivals.GUIDES, name, "--method")
    prompts, t = ["a large peach on a blue background", "a dog"], policy.scheduler.timesteps
    with torch.no_grad():
        one = guide(policy, prompts, 3.)(x, t[1])
        rows = guide(policy, prompts, torch.tensor([3., 3.]))(x, t[[1, 1]])
    assert one.shape == x.shape and torch.allclose(one, rows, atol=1e-5)


def test_no_name_is_of_two_kinds_of_method():
    methods = rivals.methods()
    assert len(set(methods)) == len(methods)
    assert rivals.is_method("sld-medium") and not rivals.is_method("esd-x")


def test_an_unknown_name_is_a_sentence():
    with pytest.raises(UserError, match="--method: magic is unknown; give one of plain, negative"):
        rivals.find(rivals.GUIDES, "magic", "--method")


def test_settings_of_an_unknown_recipe_are_the_papers():
    settings = {"embedded": {"lr": 1}, "stable_diffusion": {"lr": 2}}
    edit = rivals.Edit(None, "", "", settings=settings)
    assert rivals.settings_of(edit, "embedded") == {"lr": 1}
    assert rivals.settings_of(edit, "mine.json") == {"lr": 2}
    assert rivals.settings_of(rivals.Edit(None, "", ""), "embedded") == {}


def test_steps_are_counted_as_of_fifty(pipeline):
    policy = Policy(pipeline)
    policy.schedule(5)
    times = policy.scheduler.timesteps
    assert steps_done(policy, times[3]).shape == (1, 1, 1, 1)
    assert steps_done(policy, times).flatten().tolist() == [0, 10, 20, 30, 40]


def test_a_concept_is_words_with_commas_each_once():
    assert concept_words(" peach,full moon, peach,") == ["peach", "full moon"]
    with pytest.raises(UserError, match="--concept: ' , ' has no word; give some"):
        concept_words(" , ")
