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

def broken(pictures, prompts):
    return {"reward": np.array([np.nan] * len(pictures))}
"""


def build_random_pipeline(folder, prediction_type="epsilon", world=None):
    """A pipeline whose weights are random; world: what its world.json says, None for no such file.

    With a world it has a CLIP of its own, too.
    """
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel

    from tiny.build import make_tokenizer
    torch.manual_seed(0)
    tokenizer = make_tokenizer(f"{folder}/tokenizer")
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
    index = {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": [None, None], "feature_extractor": [None, None],
        "requires_safety_checker": False}
    with open(f"{folder}/model_index.json", "w") as file:
        json.dump(index, file)
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
def small(pipeline, tmp_path_factory):
    """Options of a run of seconds on the random pipeline, with a reward that needs no detector."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "mine.py").write_text(REWARD)
    (folder / "p.txt").write_text("a dog\na cat\n")
    options = {
        "--model": pipeline, "--prompts": folder / "p.txt", "--reward": f"{folder}/mine.py:redness",
        "--steps": 4, "--groups": 2, "--group-size": 8, "--batch-size": 8, "--guidance": 1,
        "--lr": 5e-3, "--clip-range": 2e-2, "--updates": 2, "--epochs": 6, "--save-every": 1,
        "--timestep-fraction": .5, "--advantage": "prompt", "--lr-schedule": "constant"}
    return [str(word) for pair in options.items() for word in pair]
