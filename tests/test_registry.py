"""Rivals and attacks by their names: each is where the registry says, and of its kind."""
import inspect
import re

import pytest
import torch

import rivals
from attacks import ATTACKS, Attack
from model import Policy
from plumbing.options import UserError
from rivals.guiding import concept_words, steps_done
from sample import choose_method

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
    if kind == "EDITS" or isinstance(rival, rivals.Edit):       # an attack may be an edit
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
    rival = getattr(rival, "func", rival)               # of a preset
    module = inspect.getmodule(getattr(rival, "step", getattr(rival, "run", rival)))
    assert module.__name__.startswith(("rivals.", "attacks.", "model")) and module.__doc__


def test_a_method_takes_settings_behind_its_name(pipeline):
    """sld-medium(...) with strong's numbers is sld-strong, and so for a sampler and a blocker."""
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    policy, outputs = Policy(pipeline), []
    policy.schedule(4, 1.)
    for name in ("sld-medium", "sld-medium(warm_up=7 safety_scale=2000, threshold=.025 "
                 "momentum_scale=.5 momentum_beta=.7)", "sld-strong"):
        table, guide = rivals.find_method(name, "--method")
        assert table is rivals.GUIDES and rivals.is_method(name)
        predict = guide(policy, ["a dog"], 2.)
        with torch.no_grad():
            for t in policy.scheduler.timesteps:
                output = predict(x, t)
        outputs.append(output)
    assert torch.equal(outputs[1], outputs[2]) and not torch.equal(outputs[0], outputs[2])
    table, sampler = rivals.find_method("dual-latent(weight=.25)", "--method")
    assert table is rivals.SAMPLERS and sampler.keywords == {"weight": .25}
    assert rivals.find_method("sc-pro(radius=.1)", "--method")[0] is rivals.BLOCKERS
    assert choose_method("dual-latent(weight=.25)").name == "dual-latent(weight=.25)"


@pytest.mark.parametrize("text, said", [
    ("dual-latent(speed=2)", "has no setting 'speed=2'; it takes switch=NUMBER, weight=NUMBER"),
    ("dual-latent(weight=much)", "no setting 'weight=much'"),
    ("dual-latent(weight=nan)", "no setting 'weight=nan'"),
    ("dual-latent(start=1)", "no setting 'start=1'"),
    ("plain(weight=1)", "plain has no setting 'weight=1'; it takes nothing"),
    ("dual(weight=1)", "--method: dual is unknown"),
])
def test_a_setting_that_a_method_has_not_is_refused(text, said):
    with pytest.raises(UserError, match=re.escape(said)):
        rivals.find_method(text, "--method")


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
