"""erase.py: what an edit may touch, whose settings are taken, and a run that is cut."""
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import types
from importlib import import_module

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from runs import fork
from safetensors.torch import load_file

import erase
import rivals
import rivals.duo
import rivals.eraseflow
import rivals.safegen
from erase import main, parse_args
from model import Policy
from plumbing.checkpoints import LORA_FILE, load_checkpoint
from plumbing.options import UserError
from plumbing.worlds import TrainingFile, World

EDITS = list(rivals.EDITS)
MAY_LEARN = {
    "esd-x": lambda name: "attn2" in name,
    "esd-u": lambda name: "attn2" not in name,
    "sdd": lambda name: "attn2" in name,
    "safegen": lambda name: "attn1" in name,
    "duo": lambda name: "attn1" in name,
    "eraseflow": lambda name: "attn" in name,
}


def options(edit, pipeline, *more):
    uses = rivals.find(rivals.EDITS, edit, "edit").uses
    own = {"benign": "a cup", "ema": ".5", "mosaic_weight": ".1"}
    for name in [name for name in own if name in uses]:
        more = (f"--{name.replace('_', '-')}", own[name], *more)
    if "--trainable" not in more:                       # some are LoRAs, unless told otherwise
        more = ("--trainable", "weights", *more)
    return parse_args([edit, "--model", pipeline, "--prompts", "a dog", "--steps", "4",
                       "--batch-size", "2", "--device", "cpu", "--dtype", "fp32",
                       "--save-every", "6", *more])


@pytest.fixture
def one_thread():
    """Sums in one order, here and in the process that is killed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def pictures_that_no_detector_sees(monkeypatch):
    """SafeGen's triples and DUO's pairs: the random pipeline draws nothing that trips NudeNet.

    Nor does it say what is safe, so that EraseFlow's anchor is the prompt itself.
    """
    def replace(module, name, count):
        def prepare(job, prompts, benign, labels):
            job.data = [torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(k))
                        for k in range(count)]
        edit = dataclasses.replace(getattr(module, name), prepare=prepare)
        monkeypatch.setattr(module, name, edit)
    replace(rivals.safegen, "SAFEGEN", 3)
    replace(rivals.duo, "DUO", 2)
    monkeypatch.setattr(rivals.eraseflow, "check_safe_text", lambda policy, prompts: None)


# ---- what is trained -----------------------------------------------------------------------------

@pytest.mark.parametrize("edit", EDITS)
def test_training_lowers_the_loss_of_a_draw_that_comes_again_and_again(
        pipeline, tmp_path, monkeypatch, edit):
    known = rivals.find(rivals.EDITS, edit, "edit")

    def same_draw(job, prompts, rng):
        return known.step(job, prompts, np.random.default_rng(1))
    module, _, name = rivals.EDITS[edit].rpartition(".")
    monkeypatch.setattr(import_module(module), name, dataclasses.replace(known, step=same_draw))
    folder = str(tmp_path / "run")
    main(options(edit, pipeline, "--iterations", "24", "--lr", "1e-3", "--warm-up", "0",
                 "--output-dir", folder))
    with open(f"{folder}/metrics.jsonl") as file:
        losses = [json.loads(line)["loss"] for line in file]
    assert len(losses) == 4 and losses[-1] < losses[0]


@pytest.mark.parametrize("edit", EDITS)
def test_training_touches_only_its_weights(pipeline, tmp_path, edit):
    """Read back by stock diffusers and by our own loader."""
    folder = str(tmp_path / "run")
    main(options(edit, pipeline, "--iterations", "6", "--lr", "2e-3", "--warm-up", "0",
                 "--output-dir", folder))
    before = UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet").state_dict()
    after = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    allowed = {name for name in before if MAY_LEARN[edit](name)}
    assert moved <= allowed and len(moved) > .9 * len(allowed)      # keys' biases may rest
    ours = Policy(pipeline, ((folder, 1.),)).unet.state_dict()
    assert all(torch.equal(ours[name], after[name]) for name in after)
    with open(f"{folder}/args.json") as file:
        args = json.load(file)
    assert args["model"] == pipeline and args["recipe"] == "embedded"


@pytest.mark.parametrize("edit", EDITS)
def test_a_lora_lies_on_the_edits_layers_alone_and_loads_in_diffusers(pipeline, tmp_path, edit):
    folder = str(tmp_path / "run")
    main(options(edit, pipeline, "--trainable", "lora", "--rank", "2", "--iterations", "4", "--lr",
                 "2e-2", "--warm-up", "0", "--output-dir", folder))
    names = load_file(f"{folder}/{LORA_FILE}")
    assert names and all(MAY_LEARN[edit](name) for name in names)
    base, ours = Policy(pipeline), Policy(pipeline, ((folder, 1.),))
    stock = UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet")
    stock.load_lora_adapter(folder, weight_name=LORA_FILE, prefix="unet")
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t, text = torch.tensor(500), base.encode(["a dog", "a cup"])
    with torch.no_grad():
        before, after = base.unet_output(x, t, text), ours.unet_output(x, t, text)
        theirs = stock(x, t, text).sample
    assert torch.allclose(after, theirs, atol=1e-5)
    assert not torch.allclose(after, before, atol=1e-4)


@pytest.fixture
def toy(monkeypatch):
    """An edit that trains two extra numbers, in a module of its own: the registry's "toy"."""
    def step(job, prompts, rng):
        learned = [job.trained["toy.scale"], job.trained["toy.shift"]]
        weights = next(iter(job.trained.values()))
        return sum(((p - 1) ** 2).sum() for p in learned) + (weights ** 2).sum()

    def prepare(job, prompts, benign, labels):
        assert [str(p) for p in prompts + benign] == ["a dog", "a cup"]
        return {"toy.scale": torch.zeros(3), "toy.shift": torch.zeros(1)}
    module = types.ModuleType("toy_edit")
    module.TOY = rivals.Edit(step, "a toy", weights=r".*attn2", prepare=prepare,
                             keeps_average=True, uses=("benign", "ema"),
                             settings={"embedded": {"iterations": 6, "lr": .1, "ema": .5}})
    monkeypatch.setitem(sys.modules, "toy_edit", module)
    monkeypatch.setitem(rivals.EDITS, "toy", "toy_edit.TOY")
    return module


def test_extra_tensors_are_trained_checkpointed_and_saved_beside_the_weights(
        pipeline, tmp_path, toy, one_thread):
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    main(options("toy", pipeline, "--save-every", "3", "--output-dir", whole))
    state = load_checkpoint(f"{whole}/checkpoints")
    extra = load_file(f"{whole}/checkpoints/extra.safetensors")
    assert set(extra) == {"toy.scale", "toy.shift"}
    assert all(torch.equal(extra[name], state["average"][name]) for name in extra)
    assert (state["weights"]["toy.scale"] > extra["toy.scale"]).all()
    assert (extra["toy.scale"] > .1).all()
    unet = UNet2DConditionModel.from_pretrained(whole, subfolder="unet").state_dict()
    assert not set(extra) & set(unet)

    main(options("toy", pipeline, "--save-every", "3", "--iterations", "3", "--output-dir", cut))
    main(options("toy", pipeline, "--save-every", "3", "--output-dir", cut))        # resumes
    extra_file = "checkpoints/extra.safetensors"
    assert left_by(cut, extra_file) == left_by(whole, extra_file)


def test_an_average_that_ramps_is_diffusers(pipeline, tmp_path, toy):
    """EMAModel's, of the weights after each update, capped at --ema."""
    toy.TOY = dataclasses.replace(toy.TOY, ramps=True)
    theirs, weights = None, None

    def step(job, prompts, rng):
        nonlocal theirs, weights
        weights = list(job.trained.values())
        if theirs:
            theirs.step(weights)
        else:
            theirs = EMAModel([p + 1 for p in weights], decay=.3)   # its start is forgotten
        return sum((p ** 2).sum() for p in weights)
    toy.TOY.step = step
    folder = str(tmp_path / "run")
    main(options("toy", pipeline, "--ema", ".3", "--output-dir", folder))
    theirs.step(weights)                                # the last of six updates
    ours = load_checkpoint(f"{folder}/checkpoints")["average"].values()
    assert all(torch.allclose(one, other, atol=1e-6)
               for one, other in zip(ours, theirs.shadow_params, strict=True))
    assert [erase.ramp(i) for i in (0, 1, 90)] == [0, 2 / 11, .91]


@pytest.mark.parametrize("edit, limit", [
    ("esd-x", float("inf")), ("esd-u", float("inf")), ("sdd", 1.), ("safegen", 1.)])
def test_sdd_and_safegen_clip_gradients_at_one_as_their_authors_do(
        pipeline, tmp_path, monkeypatch, edit, limit):
    norms, learns = [], torch.optim.AdamW.step

    def step(self, *args):
        gradients = [p.grad for p in self.param_groups[0]["params"] if p.grad is not None]
        norms.append(torch.stack([g.norm() for g in gradients]).norm().item())
        return learns(self, *args)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    own = rivals.find(rivals.EDITS, edit, "edit")
    steep = dataclasses.replace(own, step=lambda *given: 1e6 * own.step(*given))
    monkeypatch.setattr(rivals, "find", lambda table, name, option: steep)
    main(options(edit, pipeline, "--iterations", "2", "--output-dir", str(tmp_path)))
    assert len(norms) == 2
    assert max(norms) < 1.001 if limit == 1 else max(norms) > 10


def test_an_edit_without_extra_tensors_writes_none(pipeline, tmp_path):
    main(options("esd-x", pipeline, "--iterations", "1", "--output-dir", str(tmp_path)))
    assert not os.path.exists(tmp_path / "checkpoints" / "extra.safetensors")


# ---- settings and prompts ------------------------------------------------------------------------

def test_an_edits_own_settings_go_before_the_recipes_and_the_users_before_both(pipeline):
    args = parse_args(["esd-u", "--model", pipeline])
    assert (args.iterations, args.lr, args.batch_size) == (150, 4e-5, 16)
    assert (args.steps, args.guidance, args.rank, args.recipe) == (5, 2., 16, "embedded")
    assert args.output_dir == os.path.join("out", "esd-u")
    args = parse_args(["esd-u", "--model", pipeline, "--lr", "1e-3", "--steps", "7"])
    assert (args.lr, args.steps, args.iterations) == (1e-3, 7, 150)


@pytest.mark.parametrize("edit, lr, lora_lr", [
    ("esd-x", 2e-4, 3e-4), ("esd-u", 4e-5, 1e-3), ("sdd", 1.4e-4, 1e-3), ("safegen", 3e-4, 1e-3)])
def test_a_lora_has_a_rate_of_its_own(pipeline, edit, lr, lora_lr):
    assert parse_args([edit, "--model", pipeline]).lr == lr
    assert parse_args([edit, "--model", pipeline, "--trainable", "lora"]).lr == lora_lr


def test_stable_diffusion_has_the_authors_settings_and_its_own_steps(foreign_pipeline):
    sdd = parse_args(["sdd", "--model", foreign_pipeline])
    assert (sdd.iterations, sdd.lr, sdd.warm_up, sdd.ema) == (1500, 1e-5, 0, .999)
    assert (sdd.batch_size, sdd.start_guidance) == (1, 3.)
    assert (sdd.steps, sdd.guidance, sdd.recipe) == (50, 5., "stable_diffusion")
    esd = parse_args(["esd-x", "--model", foreign_pipeline])
    assert (esd.iterations, esd.lr, esd.batch_size, esd.warm_up) == (1000, 1e-5, 1, 0)
    assert esd.negative_guidance == 1.
    safegen = parse_args(["safegen", "--model", foreign_pipeline])
    assert (safegen.iterations, safegen.lr, safegen.mosaic_weight) == (1000, 1e-5, .1)
    assert (safegen.batch_size, safegen.ema) == (5, .9999)
    other = parse_args(["sdd", "--model", foreign_pipeline, "--recipe", "reference"])
    assert (other.recipe, other.iterations) == ("reference", 1500)  # neither: the authors'


def test_what_is_erased_without_a_prompt_file_is_the_concepts_names(
        pipeline, tmp_path, monkeypatch):
    asked = []

    def walk(prompts, *rest):
        asked.append(prompts)
        return prompts[:1]
    monkeypatch.setattr(erase, "walk", walk)
    command = ["esd-x", "--model", pipeline, "--steps", "2", "--iterations", "1", "--batch-size",
               "2", "--dtype", "fp32"]
    main(parse_args([*command, "--output-dir", str(tmp_path / "one")]))
    main(parse_args([*command, "--concept", "a dog, cat", "--output-dir", str(tmp_path / "two")]))
    assert asked == [["peach", "egg"], ["a dog", "cat"]]            # the world's, the user's
    with pytest.raises(UserError, match="--concept: .a naked child. mentions minors"):
        main(parse_args([*command, "--concept", "a naked child",
                         "--output-dir", str(tmp_path / "three")]))


def test_an_edit_with_pictures_takes_the_models_training_file_and_its_benign_one(
        pipeline, tmp_path, monkeypatch):
    def file(name, text):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)
    unsafe, benign = file("unsafe.txt", "a peach"), file("benign.txt", "a cup")
    other = file("other.txt", "a dog")
    world = World(pipeline, training_files=[TrainingFile(unsafe, benign)])
    monkeypatch.setattr(erase, "read_world", lambda model: world)
    edit = rivals.find(rivals.EDITS, "safegen", "edit")

    def read(*more):
        args = parse_args(["safegen", "--model", pipeline, *more])
        prompts, stay, _ = erase.read_prompts(args, edit)
        return prompts, stay, args
    prompts, stay, args = read()
    assert (prompts, stay) == (["a peach"], ["a cup"])
    assert (args.prompts, args.benign) == ([unsafe], [benign])      # args.json says so
    assert read("--prompts", unsafe, other)[:2] == (["a peach", "a dog"], ["a cup"])
    assert read("--prompts", other)[:2] == (["a dog"], [])
    with pytest.raises(UserError, match="--benign: 'a peach' is among --prompts, too"):
        read("--benign", unsafe)
    assert read("--benign", other)[:2] == (["a peach"], ["a dog"])
    world.training_files = []
    with pytest.raises(UserError, match="--prompts: none is given, and .* names a training file"):
        read()


# ---- a run that is cut ---------------------------------------------------------------------------

def left_by(folder, *more):
    contents = {}
    for name in ("metrics.jsonl", "unet/diffusion_pytorch_model.safetensors", *more):
        with open(f"{folder}/{name}", "rb") as file:
            contents[name] = file.read()
    return contents


def test_a_run_cut_by_sigkill_ends_bit_equal(pipeline, tmp_path):
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    command = ["sdd", "--model", pipeline, "--prompts", "a dog", "--steps", "4", "--batch-size",
               "2", "--device", "cpu", "--dtype", "fp32", "--iterations", "40", "--save-every", "5",
               "--warm-up", "30", "--lr", "1e-3"]
    args = parse_args([*command, "--output-dir", whole])
    main(args)
    assert args.benign is None
    process = fork(main, parse_args([*command, "--output-dir", cut]))
    while not os.path.exists(f"{cut}/checkpoints/epoch_0010.pt") and process.is_alive():
        time.sleep(.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert 5 <= load_checkpoint(f"{cut}/checkpoints")["epoch"] < 40
    main(parse_args([*command, "--output-dir", cut]))
    assert left_by(cut) == left_by(whole)
    main(parse_args([*command, "--output-dir", cut]))               # nothing is left to do
    assert left_by(cut) == left_by(whole)


def test_another_runs_folder_is_refused(pipeline, tmp_path, capsys):
    folder = str(tmp_path / "run")
    main(options("esd-x", pipeline, "--iterations", "1", "--output-dir", folder))
    card = capsys.readouterr().out
    assert "1 to erase, 0 benign; 0 refused" in card
    assert "recipe         embedded: --steps 4 instead of 5" in card
    assert "--batch-size 2 instead of 16" in card                   # the edit's own
    with pytest.raises(UserError, match="holds another run"):
        main(options("esd-u", pipeline, "--iterations", "1", "--output-dir", folder))


def test_a_loss_that_is_no_number_ends_the_run_before_the_weights(pipeline, tmp_path, monkeypatch):
    edit = rivals.find(rivals.EDITS, "esd-x", "edit")
    args = options("esd-x", pipeline, "--output-dir", str(tmp_path))

    def step(job, prompts, rng):
        return sum(p.sum() for p in job.trained.values()) * np.nan
    policy = Policy(pipeline, trainable=True)
    trained = erase.choose_weights(policy, edit.weights, args)
    before = {name: p.detach().clone() for name, p in trained.items()}
    job = rivals.Job(policy, args, policy.schedule(4, 1.), trained, before)
    with pytest.raises(UserError, match="iteration 1: the loss is nan; the update was refused"):
        erase.learn(dataclasses.replace(edit, step=step), job, ["a dog"])
    assert all(torch.equal(p, before[name]) for name, p in trained.items())


# ---- a user's mistakes ---------------------------------------------------------------------------

@pytest.mark.parametrize("edit, more", [
    ("esd-x", ["--benign", "a cup"]), ("esd-u", ["--ema", ".9"]), ("sdd", ["--pictures", "8"]),
    ("sdd", ["--negative-guidance", "2"]), ("safegen", ["--start-guidance", "3"]),
    ("esd-x", ["--unsafe-labels", "strict"]), ("sdd", ["--guidance", "2"])])
def test_an_option_that_the_edit_does_not_use_is_refused(pipeline, capsys, edit, more):
    with pytest.raises(SystemExit):
        options(edit, pipeline, *more)
    assert f"{more[0]}: {edit} does not use it" in capsys.readouterr().err


def test_what_an_edit_says_that_it_uses_are_options():
    used = {name for edit in EDITS for name in rivals.find(rivals.EDITS, edit, "edit").uses}
    assert len(used) > 5 and used <= set(vars(erase.parse_args(["esd-x"])))


def test_prompts_over_the_text_encoders_length_are_named(pipeline, tmp_path, capsys):
    main(options("esd-x", pipeline, "--prompts", "a dog", "a long dog " * 20, "--iterations", "1",
                 "--output-dir", str(tmp_path)))
    assert "--prompts: 1 of 2 prompts are longer than the 24 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("more, message", [
    (["--lr", "0"], "--lr: 0 is given; a number above 0 is needed"),
    (["--iterations", "0"], "--iterations: 0 is given; a whole number of 1 or more is needed"),
    (["--ema", "1"], "--ema: 1 is given; a share from 0 to below 1 is needed"),
    (["--mosaic-weight", "2"], "--mosaic-weight: 2 is given; a share from 0 to 1 is needed"),
    (["--warm-up", "-1"], "--warm-up: -1 is given"),
    (["--recipe", "magic"], "--recipe: magic is unknown; give elbo, embedded, reference"),
])
def test_a_wrong_option_is_one_sentence(pipeline, capsys, more, message):
    with pytest.raises(SystemExit) as ended:
        options("safegen", pipeline, *more)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize("more, message", [
    (["--prompts", "nowhere.csv"], "--prompts: the file nowhere.csv does not exist"),
    (["--prompts", "a naked child"], "1 refused"),
    (["--benign", "nowhere.csv"], "--benign: the file nowhere.csv does not exist"),
    (["--unsafe-labels", "KNEES"], "KNEES is no NudeNet label"),
    (["--model", "/nowhere"], "--model: the folder /nowhere does not exist"),
])
def test_a_users_mistake_is_one_sentence(pipeline, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        main(options("safegen", pipeline, "--output-dir", str(tmp_path / "run"), *more))


def test_help_answers_within_a_second():
    began = time.time()
    subprocess.run([sys.executable, f"{ROOT}/erase.py", "--help"], check=True, capture_output=True)
    assert time.time() - began < 1
