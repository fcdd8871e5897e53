"""A whole pipeline with random weights in Stable Diffusion's format, small enough to build in a second."""
import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def build_random_pipeline(folder, prediction_type="epsilon"):
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel
    import tiny
    torch.manual_seed(0)
    tokenizer = tiny.make_tokenizer(f"{folder}/tokenizer")
    tower = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, projection_dim=32, num_hidden_layers=2)
    config = CLIPConfig(text_config=dict(tower, vocab_size=len(tokenizer), max_position_embeddings=24,
                                         bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                                         pad_token_id=tokenizer.eos_token_id),
                        vision_config=dict(tower, image_size=32, patch_size=8), projection_dim=32)
    clip = CLIPModel(config)
    clip.save_pretrained(f"{folder}/clip")
    tokenizer.save_pretrained(f"{folder}/clip")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(f"{folder}/clip")
    CLIPTextModel(config.text_config).save_pretrained(f"{folder}/text_encoder")
    AutoencoderKL(block_out_channels=(8, 8, 16, 16), latent_channels=4, norm_num_groups=4, layers_per_block=1, sample_size=64,
                  down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4).save_pretrained(f"{folder}/vae")
    UNet2DConditionModel(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
                         down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                         cross_attention_dim=32, attention_head_dim=2, norm_num_groups=8).save_pretrained(f"{folder}/unet")
    DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
                  steps_offset=1, prediction_type=prediction_type).save_pretrained(f"{folder}/scheduler")
    with open(f"{folder}/model_index.json", "w") as file:
        file.write('{"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1", "scheduler": ["diffusers", "DDIMScheduler"],'
                   '"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],'
                   '"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],'
                   '"safety_checker": [null, null], "feature_extractor": [null, null], "requires_safety_checker": false}')
    return str(folder)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    return build_random_pipeline(tmp_path_factory.mktemp("pipeline"))
