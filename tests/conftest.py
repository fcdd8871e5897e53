"""A whole pipeline with random weights in Stable Diffusion's format, built in a second."""
import json
import os

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
REWARD = """
import numpy as np

def redness(pictures, prompts):
    red = pictures.astype(np.float32).mean((1, 2)) / 255
    return {"reward": red[:, 0] - red[:, 1:].mean(1)}

def redness_of_unsafe_dogs(pictures, prompts):
    return redness(pictures, prompts) | {"unsafe": np.array(["dog" in p for p in prompts]) * 1.}

def broken(pictures, prompts):
    return {"reward": np.array([np.nan] * len(pictures))}
"""


@pytest.fixture(scope="session")
def small_world(tmp_path_factory):
    """A world that tiny/build.py built in a few steps: (its options, its folder, --work)."""
    from icons import build_small_world
    return build_small_world(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Sums in one order, here and in other processes; and a fork would wait for other threads."""
    import torch
    torch.set_num_threads(1)


def build_tokenizer(folder):
    """The embedded world's."""
    from tiny.build import make_tokenizer
    from tiny.drawings import read_emoji
    return make_tokenizer(read_emoji(os.path.join(ROOT, "tiny", "emoji.csv")), folder)


def build_random_pipeline(folder, prediction_type="epsilon", world=None):
    """A pipeline whose weights are random; world: what its world.json says, None for no such file.

    With a world it has a CLIP of its own, too.
    """
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = build_tokenizer(f"{folder}/tokenizer")
    tower = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, projection_dim=32,
                 num_hidden_layers=2)
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
               pad_token_id=tokenizer.eos_token_id)
    config = CLIPConfig(
        text_config=dict(tower, vocab_size=len(tokenizer), max_position_embeddings=24, **ids),
        vision_config=dict(tower, image_size=32, patch_size=8), projection_dim=32)
    clip = CLIPModel(config)
    if world is not None:
        clip.save_pretrained(f"{folder}/clip")
        tokenizer.save_pretrained(f"{folder}/clip")
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
                           ).save_pretrained(f"{folder}/clip")
        with open(f"{folder}/world.json", "w") as file:
            json.dump(world, file)
    CLIPTextModel(config.text_config).save_pretrained(f"{folder}/text_encoder")
    AutoencoderKL(block_out_channels=(8, 8, 16, 16), latent_channels=4, norm_num_groups=4,
                  layers_per_block=1, sample_size=64,
                  down_block_types=("DownEncoderBlock2D",) * 4,
                  up_block_types=("UpDecoderBlock2D",) * 4).save_pretrained(f"{folder}/vae")
    UNet2DConditionModel(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32),
                         layers_per_block=1,
                         down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                         up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                         cross_attention_dim=32, attention_head_dim=2, norm_num_groups=8
                         ).save_pretrained(f"{folder}/unet")
    DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear",
                  clip_sample=False, set_alpha_to_one=False, steps_offset=1,
                  prediction_type=prediction_type).save_pretrained(f"{folder}/scheduler")
    write_index(folder, "DDIMScheduler")
    return str(folder)


def write_index(folder, scheduler):
    """model_index.json of a pipeline without a safety checker."""
    index = {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": [None, None], "feature_extractor": [None, None],
        "requires_safety_checker": False}
    with open(f"{folder}/model_index.json", "w") as file:
        json.dump(index, file)


SD1 = {
    "unet": dict(block_out_channels=(16, 16, 32, 32), attention_head_dim=8),
    "text": dict(hidden_act="quick_gelu", num_hidden_layers=2),
    "pad": "<|endoftext|>",
    "scheduler": dict(_class_name="PNDMScheduler", skip_prk_steps=True, steps_offset=1)}
SD2 = {
    "unet": dict(block_out_channels=(16, 16, 32, 32), attention_head_dim=[1, 1, 2, 2],
                 use_linear_projection=True, upcast_attention=True),
    "text": dict(hidden_act="gelu", num_hidden_layers=3),
    "pad": "!",
    "scheduler": dict(_class_name="DDIMScheduler", steps_offset=1, prediction_type="v_prediction")}


def build_stable_diffusion(folder, edition):
    """A random pipeline of Stable Diffusion's shape, edition SD1 or SD2, but narrow and small.

    It has the real ones' blocks, layers a block, kinds of attention, 77 tokens, files and names of
    the text encoder's weights, which are not those of today's transformers; pictures have 128
    pixels a side.
    """
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from safetensors.torch import load_file, save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    made = json.loads(build_tokenizer(f"{folder}/tokenizer").backend_tokenizer.to_str())["model"]
    os.remove(f"{folder}/tokenizer/tokenizer.json")     # the real ones have the older files
    vocabulary = made["vocab"] | {"!": made["vocab"].get("!", len(made["vocab"]))}
    texts = {
        "vocab.json": json.dumps(vocabulary),
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, made["merges"])]),
        "special_tokens_map.json": json.dumps({
            "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>", "pad_token": edition["pad"]}),
        "tokenizer_config.json": json.dumps({
            "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True,
            "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>", "pad_token": edition["pad"]})}
    for name, text in texts.items():
        with open(f"{folder}/tokenizer/{name}", "w", encoding="utf-8") as file:
            file.write(text)
    CLIPTextModel(CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_attention_heads=4,
        max_position_embeddings=77, bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"], **edition["text"]
        )).save_pretrained(f"{folder}/text_encoder")
    path, prefix = f"{folder}/text_encoder/model.safetensors", "text_model."
    names = {prefix + name.removeprefix(prefix): t for name, t in load_file(path).items()}
    names[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
    save_file(names, path, metadata={"format": "pt"})
    UNet2DConditionModel(sample_size=16, cross_attention_dim=32, norm_num_groups=8,
                         **edition["unet"]).save_pretrained(f"{folder}/unet")
    AutoencoderKL(block_out_channels=(8, 8, 16, 16), latent_channels=4, norm_num_groups=8,
                  layers_per_block=2, sample_size=128,
                  down_block_types=("DownEncoderBlock2D",) * 4,
                  up_block_types=("UpDecoderBlock2D",) * 4).save_pretrained(f"{folder}/vae")
    os.makedirs(f"{folder}/scheduler")
    with open(f"{folder}/scheduler/scheduler_config.json", "w") as file:
        json.dump({"beta_start": .00085, "beta_end": .012, "beta_schedule": "scaled_linear",
                   "num_train_timesteps": 1000, "set_alpha_to_one": False, "clip_sample": False,
                   "trained_betas": None, **edition["scheduler"]}, file)
    write_index(folder, edition["scheduler"]["_class_name"])
    return str(folder)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """A pipeline with the embedded world's settings, a CLIP of its own and words of a concept."""
    world = {"recipe": "embedded", "clip": "clip", "concept": "peach, egg"}
    return build_random_pipeline(tmp_path_factory.mktemp("pipeline"), world=world)


@pytest.fixture(scope="session")
def foreign_pipeline(tmp_path_factory):
    """A pipeline in Stable Diffusion's format that says nothing of itself."""
    return build_random_pipeline(tmp_path_factory.mktemp("foreign"))


@pytest.fixture(scope="session")
def sd1_pipeline(tmp_path_factory):
    """A random pipeline of Stable Diffusion 1.x's shape: epsilon, 8 heads a layer."""
    return build_stable_diffusion(tmp_path_factory.mktemp("sd1"), SD1)


@pytest.fixture(scope="session")
def sd2_pipeline(tmp_path_factory):
    """A random pipeline of Stable Diffusion 2.x's shape: v, linear projections, heads of 16."""
    return build_stable_diffusion(tmp_path_factory.mktemp("sd2"), SD2)


@pytest.fixture(scope="session")
def small(pipeline, tmp_path_factory):
    """Options of a run of seconds on the random pipeline, with a reward that needs no detector."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "mine.py").write_text(REWARD)
    (folder / "p.txt").write_text("a dog\na cat\n")
    options = {
        "--model": pipeline, "--prompts": folder / "p.txt", "--reward": f"{folder}/mine.py:redness",
        "--steps": 4, "--groups": 2, "--group-size": 8, "--batch-size": 8, "--guidance": 1,
        "--lr": 5e-3, "--clip-range": 2e-2, "--updates": 2, "--epochs": 6, "--save-every": 1,
        "--timestep-fraction": .5, "--advantage": "prompt", "--lr-schedule": "constant",
        "--safe-text-weight": 0, "--base-weight": 0,
        "--decision": "drawn"}          # what may be expected of a random network, nobody knows
    return [str(word) for pair in options.items() for word in pair]
