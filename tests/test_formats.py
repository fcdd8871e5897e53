"""plumbing/formats.py and weights.py: which weights are read, and which are named and refused.

The sentences themselves are in test_bad_input.py; here is what is read after all, and that nothing
that is read is in part.
"""
import json
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from model import Policy
from plumbing.checkpoints import LORA_FILE
from plumbing.formats import (
    PIPELINE_FILES,
    STEMS,
    local_folder,
    recognise,
    weight_files,
    what_holds,
)
from plumbing.options import UserError
from plumbing.weights import check_weights, load_clip, load_text, load_unet, load_vae
from prompts import Prompt
from sample import generate

ARGS = type("Args", (), {"steps": 4, "guidance": 3., "batch_size": 1})


def copy_with(pipeline, folder, file, **changes):
    """A copy of a pipeline in whose JSON file some values are others."""
    shutil.copytree(pipeline, folder)
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(folder)


def draws(folder):
    """A picture of a model, which is none of one colour."""
    picture = generate(Policy(folder), [Prompt("a peach")], [1], ARGS)[0]
    assert picture.std() > 2
    return picture


# ---- bases that are read -------------------------------------------------------------------------

SCHEDULER = "scheduler/scheduler_config.json"


@pytest.mark.parametrize("config", [
    {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "linspace"},
    {"_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": "linspace",
     "algorithm_type": "dpmsolver++", "use_karras_sigmas": True},
    {"_class_name": "PNDMScheduler", "skip_prk_steps": True}])
def test_another_samplers_scheduler_draws_what_ddims_draws(pipeline, tmp_path, config):
    other = copy_with(pipeline, tmp_path / "other", SCHEDULER, **config)
    assert (draws(other) == draws(pipeline)).all()


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_a_signal_of_zero_is_drawn_by_velocity(pipeline, tmp_path, spacing):
    folder = copy_with(pipeline, tmp_path / "v", SCHEDULER, prediction_type="v_prediction",
                       rescale_betas_zero_snr=True, timestep_spacing=spacing)
    draws(folder)
    schedule = Policy(folder).schedule(4)
    assert all(torch.isfinite(row).all() for row in schedule)


def test_a_size_that_is_a_list_is_height_and_width(pipeline, tmp_path):
    folder = copy_with(pipeline, tmp_path / "wide", "unet/config.json", sample_size=[8, 16])
    assert draws(folder).shape == (64, 128, 3)


def test_weights_in_several_files_are_one_network(pipeline, tmp_path):
    folder = copy_with(pipeline, tmp_path / "sharded", "unet/config.json")
    unet = Policy(pipeline).unet
    (tmp_path / "sharded/unet/diffusion_pytorch_model.safetensors").unlink()
    unet.save_pretrained(tmp_path / "sharded/unet", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded/unet").glob("*-of-*.safetensors"))) > 1
    assert (draws(folder) == draws(pipeline)).all()


def test_of_a_single_file_and_an_index_the_one_is_looked_at_that_is_loaded(pipeline, tmp_path):
    """diffusers takes the index, transformers the single file."""
    for part, stem in STEMS.items():
        names = [f"{stem}.safetensors", f"{stem}.safetensors.index.json"]
        folder = copy_with(pipeline, tmp_path / part, f"{part}/config.json")
        index = {"metadata": {}, "weight_map": {"x": "shard"}}
        (tmp_path / part / part / names[1]).write_text(json.dumps(index))
        found = weight_files(f"{folder}/{part}", stem, "--model")
        taken = names[0] if part == "text_encoder" else "shard"
        assert found == [f"{folder}/{part}/{taken}"]


def test_weights_of_eight_bits_with_a_fraction_are_read(pipeline, tmp_path):
    folder = shutil.copytree(pipeline, tmp_path / "fp8")
    for path in [*(folder / f"{part}/{stem}.safetensors" for part, stem in STEMS.items()),
                 folder / "clip/model.safetensors"]:
        save_file({name: t.to(torch.float8_e4m3fn) for name, t in load_file(path).items()}, path,
                  metadata={"format": "pt"})
    draws(str(folder))
    load_clip(str(folder / "clip"))


def test_a_config_that_says_half_precision_rounds_nothing(pipeline, tmp_path):
    """Saved once in fp32 and once as variant fp16, a folder has the second one's config."""
    folder = shutil.copytree(pipeline, tmp_path / "both")
    config = json.loads((folder / "text_encoder/config.json").read_text())
    (folder / "text_encoder/config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    ours, theirs = (Policy(str(path)).encode(["a large peach"]) for path in (folder, pipeline))
    assert torch.equal(ours, theirs)


def test_stable_diffusions_own_shapes_are_read(sd1_pipeline, sd2_pipeline):
    for folder, prediction in ((sd1_pipeline, "epsilon"), (sd2_pipeline, "v_prediction")):
        policy = Policy(folder)
        assert policy.prediction_type == prediction and policy.text_length == 77
        assert draws(folder).shape == (128, 128, 3)


# ---- parts ---------------------------------------------------------------------------------------

@pytest.fixture
def lora(pipeline, tmp_path):
    """A folder with a LoRA."""
    policy = Policy(pipeline, trainable=True)
    policy.make_trainable("lora", 4)
    (tmp_path / "lora").mkdir()
    policy.save(str(tmp_path / "lora"), "card")
    return str(tmp_path / "lora")


def test_a_part_is_a_file_a_folder_or_a_pipeline(pipeline, lora, tmp_path):
    file = os.path.join(lora, LORA_FILE)
    assert recognise(lora) == recognise(file) == [("lora", file)]
    assert recognise(pipeline) == [("unet", os.path.join(pipeline, "unet"))]
    both = shutil.copytree(pipeline, tmp_path / "both")
    shutil.copy(file, both)
    assert [kind for kind, _ in recognise(str(both))] == ["unet", "lora"]


def test_a_pipelines_other_networks_may_be_the_bases_in_another_spelling(sd1_pipeline, tmp_path):
    """A part with the base's own text encoder, VAE and noise is read for its UNet."""
    folder = shutil.copytree(sd1_pipeline, tmp_path / "part")
    path = folder / "text_encoder/model.safetensors"
    tensors = load_file(path)
    del tensors["text_model.embeddings.position_ids"]
    save_file({name.removeprefix("text_model."): t for name, t in tensors.items()}, path)
    (folder / "v1-5-pruned.safetensors").write_bytes(b"")
    noise = folder / SCHEDULER
    noise.write_text(json.dumps(json.loads(noise.read_text()) | {"rescale_betas_zero_snr": False}))
    assert check_weights(sd1_pipeline, [(str(folder), 1.)]).unet == str(folder)


def test_check_weights_says_what_is_loaded_and_loads_no_network(pipeline, lora, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", None)
    found = check_weights(pipeline, [(pipeline, 1.), (lora, .5)])
    assert (found.base, found.unet, found.unet_option) == (pipeline, pipeline, "--checkpoint")
    (halves, weight), = found.loras
    assert weight == .5 and list(halves) == ["unet"]
    layers = load_file(os.path.join(lora, LORA_FILE))
    assert 2 * len(halves["unet"]) == len(layers)


def test_each_file_that_a_lora_may_be_taken_for_is_called_by_its_name(pipeline):
    """Of the names in real files; a LoRA's layers are no whole weights."""
    for name, kind in {
            "model.diffusion_model.input_blocks.0.0.weight": "a single-file checkpoint's UNet",
            "unet.down_blocks.0.resnets.0.conv1.weight": "some of a UNet's own weights",
            "decoder.conv_in.weight": "a VAE's weights",
            "text_model.encoder.layers.0.mlp.fc1.weight": "a text encoder's weights",
            "down_blocks.0.motion_modules.0.proj_in.weight": "a motion module (AnimateDiff)",
            "image_proj.proj.weight": "an IP-Adapter"}.items():
        assert what_holds([name]) == kind
    assert what_holds(["x"]) == "none of the known forms: it has 1 tensors, such as x"
    assert what_holds([]) == "none of the known forms: it has 0 tensors"


# ---- whole or not at all -------------------------------------------------------------------------

LOADERS = {"unet": partial(load_unet, option="--model"), "vae": load_vae, "text_encoder": load_text}


@pytest.mark.parametrize("part", STEMS)
def test_no_network_is_filled_up_with_random_weights(pipeline, tmp_path, part):
    """from_pretrained only warns of what a file lacks: any one weight that is gone is named."""
    file = f"{part}/{STEMS[part]}.safetensors"
    tensors = load_file(f"{pipeline}/{file}")
    for i, name in enumerate(sorted(tensors)[::9]):
        folder = shutil.copytree(pipeline, tmp_path / str(i))
        save_file({n: t for n, t in tensors.items() if n != name}, folder / file)
        with pytest.raises(UserError, match=f"--model: .*{part} lacks 1 of its weights.*{name}"):
            LOADERS[part](str(folder))


def test_a_tokenizer_that_reads_all_prompts_alike_is_refused(pipeline, tmp_path):
    """transformers makes an empty vocabulary of a folder that lacks its files, without a word."""
    for i, model in enumerate(({"vocab": {"<|startoftext|>": 0, "<|endoftext|>": 1}, "merges": []},
                               {"merges": []})):
        folder = shutil.copytree(pipeline, tmp_path / str(i))
        for path, load in (("tokenizer/tokenizer.json", Policy), ("clip/tokenizer.json",
                                                                  load_clip)):
            made = json.loads((folder / path).read_text())
            made["model"] |= model
            (folder / path).write_text(json.dumps(made))
            with pytest.raises(UserError, match="--model: .* (tell words apart|no usable)"):
                load(str(folder / "clip" if load is load_clip else folder))
    shutil.copytree(pipeline, tmp_path / "more")
    config = tmp_path / "more/text_encoder/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 100}))
    with pytest.raises(UserError, match="--model: "):
        Policy(str(tmp_path / "more"))


CONFIGS = ["unet/config.json", "vae/config.json", "text_encoder/config.json", SCHEDULER,
           "tokenizer/tokenizer_config.json"]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.data())
def test_whatever_a_config_says_the_model_is_refused_or_gives_numbers(pipeline, tmp_path_factory,
                                                                      data):
    folder = shutil.copytree(pipeline, tmp_path_factory.mktemp("model"), dirs_exist_ok=True)
    file = folder / data.draw(st.sampled_from(CONFIGS))
    config = json.loads(file.read_text())
    key = data.draw(st.sampled_from(sorted(config)))
    value = data.draw(st.sampled_from([None, "x", -1, 0, 3, .5, True, [], [3], {}]))
    file.write_text(json.dumps(config | {key: value}))
    try:
        policy = Policy(str(folder))
    except UserError as error:
        assert str(error).startswith("--model: ") and "\n" not in str(error)
        return
    text = policy.encode(["a dog"])
    x = torch.randn(1, *policy.latent_shape(), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert policy.unet_output(x, torch.tensor(500), text).isfinite().all()


# ---- the hub -------------------------------------------------------------------------------------

def test_what_the_hub_gave_before_is_read_without_a_network(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--someone--some-model"
    shutil.copytree(pipeline, repo / "snapshots" / "1")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("1")
    found = local_folder("someone/some-model")
    assert os.path.samefile(found, repo / "snapshots" / "1")
    with pytest.raises(UserError, match="--model: someone/another is not available from the hub"):
        local_folder("someone/another")


def test_a_hub_name_without_a_network_is_a_sentence_within_a_minute(tmp_path):
    """A proxy that is not there stands for the missing network."""
    command = ("from plumbing.formats import local_folder; from plumbing.options import run; "
               "run(lambda name: local_folder(name), 'someone/some-model')")
    environment = {**os.environ, "HTTPS_PROXY": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0",
                   "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, env=environment, timeout=60,
                          capture_output=True, text=True)
    assert done.returncode == 2 and "is not available from the hub" in done.stderr
    assert done.stderr.count("\n") == 1


def test_only_what_is_read_is_asked_of_the_hub():
    from huggingface_hub.utils import filter_repo_objects
    files = ["v1-5-pruned.ckpt", "unet/diffusion_pytorch_model.bin", "model_index.json",
             "unet/diffusion_pytorch_model.fp16.safetensors", "safety_checker/model.safetensors",
             "unet/diffusion_pytorch_model.safetensors", "unet/config.json", "vae/config.json",
             "text_encoder/model.safetensors", "tokenizer/merges.txt", "tokenizer/vocab.json",
             "scheduler/scheduler_config.json"]
    asked = set(filter_repo_objects(files, allow_patterns=PIPELINE_FILES))
    assert asked == {"model_index.json", *files[5:]}


def test_a_vae_by_its_older_names_is_the_same(sd1_pipeline, tmp_path):
    part = shutil.copytree(sd1_pipeline, tmp_path / "older")
    path = part / "vae/diffusion_pytorch_model.safetensors"
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.",
             ".to_out.0.": ".proj_attn."}
    weights = load_file(path)
    for new, old in names.items():
        weights = {name.replace(new, old) if ".attentions." in name else name: tensor
                   for name, tensor in weights.items()}
    assert any(".query." in name for name in weights)
    save_file(weights, path, metadata={"format": "pt"})
    check_weights(sd1_pipeline, [(str(part), 1.)])
    check_weights(str(part), [(sd1_pipeline, 1.)])


def test_what_save_lora_adapter_writes_is_read_with_its_alpha(sd1_pipeline, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(sd1_pipeline, subfolder="unet")
    unet.add_adapter(LoraConfig(r=4, lora_alpha=16, target_modules=["to_q"],
                                init_lora_weights=False))
    unet.save_lora_adapter(str(tmp_path))
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 77, unet.config.cross_attention_dim)
    policy = Policy(sd1_pipeline, [(str(tmp_path), 1.)])
    with torch.no_grad():
        theirs = unet(x, 500, text).sample
    assert torch.allclose(policy.unet_output(x, torch.tensor(500), text), theirs, atol=1e-5)


def test_a_trainings_own_state_beside_a_lora_is_no_part_of_it(pipeline, lora):
    for name in ("model.safetensors", "random_states_0.pkl", "optimizer.bin"):
        open(os.path.join(lora, name), "w").close()
    check_weights(pipeline, [(str(lora), 1.)])
