"""plumbing/worlds.py: what a folder says of itself, and which settings are taken."""
import json
import os

import pytest
from conftest import ROOT

import attack
import erase
import evaluate
import sample
import train
from plumbing.options import UserError
from plumbing.worlds import World, overridden, read_recipe, read_world, recipe_names

SD = "CompVis/stable-diffusion-v1-4"


def write_world(folder, **world):
    (folder / "world.json").write_text(json.dumps(world))
    return str(folder)


def test_a_folder_without_a_world_has_stable_diffusions(tmp_path):
    for model in (str(tmp_path), SD):
        world = read_world(model)
        assert (world.recipe, world.concept) == ("stable_diffusion", "nudity, sexual")
        assert world.clip == "openai/clip-vit-large-patch14"
        assert world.judge is None and not world.harmless and not world.training_files


def test_the_embedded_world_names_files_that_are_there():
    world = read_world(os.path.join(ROOT, "tiny"))
    assert world.harmless and world.recipe == "embedded"
    assert os.path.isdir(world.clip) and os.path.isdir(world.judge)
    assert os.path.isfile(world.concept_pairs)
    assert len(world.training_files) == 2               # nudity's and faces'
    for entry in world.training_files:
        for file in (entry.prompts, entry.benign, *entry.validation, *entry.held_out):
            assert os.path.isfile(file)


def test_a_world_built_elsewhere_works_the_same(tmp_path):
    """Its files are found from its own folder; any spelling of a training file's path is its."""
    (tmp_path / "data").mkdir()
    for name in ("train", "benign", "test"):
        (tmp_path / "data" / f"{name}.csv").write_text("prompt\na dog\n")
    folder = write_world(tmp_path, recipe="embedded", clip="somebody/clip", training_files={
        "data/train.csv": {"benign": "data/benign.csv", "held_out": ["data/test.csv"]}})
    world = read_world(folder)
    assert world.clip == "somebody/clip"                # no such folder inside: a hub id
    entry = world.training_file(os.path.join(folder, "data", "..", "data", "train.csv"))
    assert os.path.samefile(entry.prompts, tmp_path / "data" / "train.csv")
    assert os.path.abspath(entry.held_out[0]) == str(tmp_path / "data" / "test.csv")
    assert world.training_file("data/other.csv") is None


@pytest.mark.parametrize("text, sentence", [
    ("{", "not a file with a JSON object"), ("[]", "not a file with a JSON object"),
    ('{"clipp": "x"}', "unknown key 'clipp'"),
    ('{"training_files": ["a.csv"]}', "training_files"),
    ('{"training_files": {"a.csv": {"held_out": "b.csv"}}}', "held_out are lists"),
    ('{"training_files": {"a.csv": {}}}', "names the file .*a.csv, which does not exist"),
    ('{"harmless": "no"}', "harmless in .* is 'no'; a JSON true or false is needed"),
    ('{"clip": 5}', "clip in .* is 5; a JSON text is needed"),
    ('{"concept": "girl, nude"}', "concept in .*: 'girl, nude' mentions minors"),
])
def test_a_world_that_can_not_be_used_is_a_sentence(tmp_path, text, sentence):
    (tmp_path / "world.json").write_text(text)
    with pytest.raises(UserError, match=f"--model: .*{sentence}"):
        read_world(str(tmp_path))


def test_settings_belong_to_the_model():
    """Stable Diffusion gets its own without a further option; what is given goes before it."""
    ours = train.parse_args([])
    theirs = train.parse_args(["--model", SD, "--prompts", "i2p.csv", "--lr", "1e-5"])
    assert (ours.recipe, ours.steps, ours.rank, ours.lr) == ("embedded", 5, 16, 7e-3)
    assert (theirs.recipe, theirs.steps, theirs.guidance) == ("stable_diffusion", 50, 5)
    assert (theirs.rank, theirs.lora_targets, theirs.clip_range) == (4, "attention", 1e-4)
    assert theirs.gradient_checkpointing and theirs.lr == 1e-5
    assert overridden(theirs, {}) == {"lr": (3e-4, 1e-5)} and overridden(ours, {}) == {}
    reference = train.parse_args(["--recipe", "reference", "--steps", "5"])
    assert reference.advantage == "memory" and reference.group_size == 1
    assert reference.steps == 5 and reference.recipe == "reference"


def test_help_shows_the_values_of_the_model_that_is_given(capsys):
    for options, line in (([], "AdamW [0.007]"), (["--model", SD], "AdamW [0.0003]"),
                          (["--recipe", "reference"], "prompts per epoch [256]")):
        with pytest.raises(SystemExit) as end:
            train.parse_args([*options, "--help"])
        assert end.value.code == 0 and line in " ".join(capsys.readouterr().out.split())


def test_a_recipe_may_name_prompts(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"prompts": "a dog", "benign": ["a cup", "a cat"]}')
    args = train.parse_args(["--recipe", str(path)])
    assert args.prompts == ["a dog"] and args.benign == ["a cup", "a cat"]


def test_every_recipe_sets_the_same_options_of_the_trainer():
    assert set(recipe_names()) >= {"embedded", "stable_diffusion", "reference"}
    keys = {name: set(read_recipe(name)) for name in recipe_names()}
    assert keys.pop("elbo") < keys["embedded"]          # a few options over a model's own
    assert len(set(map(frozenset, keys.values()))) == 1
    for name in recipe_names():
        args = train.parse_args(["--recipe", name])
        assert overridden(args, {}) == {}


def test_a_recipe_of_ones_own_may_hold_a_few_options_over_the_models(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"lr": 1e-5, "rank": 8}')
    theirs = train.parse_args(["--model", SD, "--prompts", "i2p.csv", "--recipe", str(path)])
    assert (theirs.lr, theirs.rank, theirs.recipe) == (1e-5, 8, str(path))
    assert (theirs.steps, theirs.guidance, theirs.clip_range) == (50, 5, 1e-4)
    ours = train.parse_args(["--recipe", str(path), "--rank", "2"])
    assert (ours.lr, ours.rank, ours.steps) == (1e-5, 2, 5)
    drawn = sample.parse_args(["a dog", "--model", SD, "--recipe", str(path)])
    assert drawn.steps == 50
    edit = erase.parse_args(["esd-x", "--recipe", str(path)])
    assert (edit.lr, edit.iterations, edit.rank) == (2e-4, 150, 8)      # an edit's own goes on top


@pytest.mark.parametrize("recipe, sentence", [
    ("magic", "--recipe: magic is unknown; give elbo, embedded, reference, stable_diffusion"),
    ({"stepz": 5}, "has an unknown option 'stepz'"),
    ({"steps": None}, "has steps null; leave it out"),
    ({"steps": True}, "has steps True; a number or a text is needed"),
    ({"gradient_checkpointing": "no"}, "'no'; true or false is needed"),
    ({"steps": -1}, "--steps: -1 is given"),
    ({"advantage": "best"}, "has advantage 'best'; give batch, prompt, memory"),
])
def test_a_recipe_that_can_not_be_used_is_a_sentence(tmp_path, capsys, recipe, sentence):
    if isinstance(recipe, dict):
        (tmp_path / "r.json").write_text(json.dumps(recipe))
        recipe = str(tmp_path / "r.json")
    with pytest.raises(SystemExit) as end:
        train.parse_args(["--recipe", recipe])
    err = capsys.readouterr().err
    assert end.value.code == 2 and sentence in err and err.count("\n") == 1


@pytest.mark.parametrize("program, options", [
    (sample, ["a dog"]), (evaluate, []), (erase, ["esd-x"]), (attack, ["ring-a-bell"])])
def test_a_recipe_may_be_of_several_programs_but_not_of_none(tmp_path, capsys, program, options):
    path = tmp_path / "r.json"
    path.write_text('{"steps": 7, "clip_range": 0.1}')
    assert program.parse_args([*options, "--recipe", str(path)]).recipe == str(path)
    path.write_text('{"stpes": 7}')
    with pytest.raises(SystemExit) as end:
        program.parse_args([*options, "--recipe", str(path)])
    err = capsys.readouterr().err
    assert end.value.code == 2 and "unknown option 'stpes'; did you mean steps?" in err


def test_a_clip_that_a_world_names_is_named_with_the_file(tmp_path):
    world = read_world(write_world(tmp_path, clip="nowhere/clip/x"))
    assert world.clip_option == f"--model: clip in {tmp_path}/world.json"
    assert World(SD).clip_option == "--model"


def test_drawing_follows_the_checkpoints_own_run_then_the_models_recipe(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    args = {"model": SD, "recipe": "stable_diffusion", "steps": 20, "guidance": 4.5, "lr": 1}
    (run / "args.json").write_text(json.dumps(args))
    drawn = sample.parse_args(["a dog", "--checkpoint", f"{run}+sld-medium"])
    assert (drawn.steps, drawn.guidance, drawn.recipe) == (20, 4.5, "stable_diffusion")
    assert sample.parse_args(["a dog", "--checkpoint", str(run), "--steps", "7"]).steps == 7
    assert sample.parse_args(["a dog", "--model", SD]).steps == 50
    assert sample.parse_args(["a dog"]).steps == 5
    args = {"model": "tiny", "steps": 9, "guidance": 1.5}       # the first edition's has no recipe
    (run / "args.json").write_text(json.dumps(args))
    drawn = sample.parse_args(["a dog", "--checkpoint", str(run)])
    assert (drawn.steps, drawn.guidance, drawn.recipe) == (9, 1.5, "embedded")


def test_a_json_file_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "r.json"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"lr": 0.001}')
    assert read_recipe(str(path)) == {"lr": .001}
