"""A base and a checkpoint's parts, read whole or refused with one sentence.

check_weights looks before anything heavy is loaded; the loaders look again at what arrived, since
from_pretrained only warns where a network's file lacks weights, and fills in random ones.
"""
import os
import re
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors import safe_open
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from plumbing.formats import (
    CLIP_FILES,
    STEMS,
    check_base,
    check_tokenizer,
    check_unet,
    first_line,
    is_number,
    local_folder,
    read_config,
    read_shapes,
    recognise,
    weight_files,
)
from plumbing.loras import read_lora
from plumbing.options import UserError
from plumbing.worlds import read_json

# what a text encoder's file may hold beside it, where it was cut out of a CLIP
OF_CLIP = re.compile(r"vision_model\.|text_projection|visual_projection|logit_scale|"
                     r".*position_ids$")


@dataclass
class Weights:
    """What a policy is loaded from."""
    base: str           # the base pipeline's folder
    unet: str           # the folder whose unet/ is taken, the base's or a part's
    unet_option: str    # the option that named it
    loras: list         # of ({network: {layer: (down, up)}}, weight): plumbing.loras.read_lora's


def check_weights(model, parts=()):
    """The Weights of a base and a checkpoint's parts; no network is loaded.

    model: a folder or hub id; parts: (path, weight) pairs. UserError where the base or a part is of
    a form that can't be read, or where a part doesn't fit the base.
    """
    base = local_folder(model)
    check_base(base)
    found = [(kind, place, weight) for path, weight in parts for kind, place in recognise(path)]
    whole = [(os.path.dirname(place), weight) for kind, place, weight in found if kind == "unet"]
    if len(whole) > 1 or any(weight != 1 for _, weight in whole):
        names = ", ".join(f"{path}@{weight:g}" for path, weight in whole)
        raise UserError(f"--checkpoint: {names} are whole UNets, which do not add; "
                        "give one of them, without a weight, and any number of LoRAs")
    shapes = {part: read_shapes(os.path.join(base, part), STEMS[part], "--model")
              for part in ("unet", "text_encoder")}
    unet, option = base, "--model"
    if whole:
        unet, option = whole[0][0], "--checkpoint"
        check_unet(unet, base, option)
        own = read_shapes(os.path.join(unet, "unet"), STEMS["unet"], option)
        wrong = [name for name in sorted(own.keys() | shapes["unet"].keys())
                 if own.get(name) != shapes["unet"].get(name)]
        if wrong:
            raise UserError(f"{option}: {unet}/unet is not a UNet of {model}: {len(wrong)} of "
                            f"its weights are missing or of another shape, such as {wrong[0]}")
    for part, stem in STEMS.items():
        is_parts = part == "unet" and whole
        check_finite(os.path.join(unet if is_parts else base, part), stem,
                     option if is_parts else "--model")
    loras = [(read_lora(place, shapes), weight) for kind, place, weight in found if kind == "lora"]
    return Weights(base, unet, option, loras)


def check_finite(folder, stem, option):
    """UserError where a network's weights have numbers that are not finite (seconds for SD)."""
    for path in weight_files(folder, stem, option):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                if not torch.isfinite(file.get_tensor(name)).all():
                    raise UserError(f"{option}: {path} has numbers that are not finite, in {name}; "
                                    "get the file again")


# ---- loading -------------------------------------------------------------------------------------

def load_network(cls, folder, subfolder="", option="--model"):
    """A network of a folder, or of one inside it, with all its weights from there."""
    path = os.path.join(folder, subfolder)
    try:
        network, info = cls.from_pretrained(path, use_safetensors=True, output_loading_info=True)
    except MemoryError:
        raise
    except Exception as error:                          # a broken config's errors are of any kind
        raise UserError(f"{option}: {path} is not usable ({first_line(error)})") from None
    missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if missing:
        raise UserError(f"{option}: {path} lacks {len(missing)} of its weights or has them in "
                        f"another shape, such as {missing[0]}; get the whole file")
    left = sorted(name for name in info["unexpected_keys"] if not OF_CLIP.match(name))
    if left:
        raise UserError(f"{option}: {path} has {len(left)} weights without a place, such as "
                        f"{left[0]}; its config.json is another model's")
    return network.requires_grad_(False).eval().float()


def to_precision(network, dtype):
    """Weights that are not trained to dtype; those that are, or that are a LoRA's, stay float32."""
    for name, p in network.named_parameters():
        if not p.requires_grad and "lora_" not in name:
            p.data = p.data.to(dtype)


def check_call(path, option, call, what="its config.json is another model's"):
    """UserError where a network of path can't be called, or where it gives what is not finite."""
    try:
        with torch.no_grad():
            is_finite = torch.isfinite(call()).all()
    except Exception as error:
        raise UserError(f"{option}: {path} can't be used ({first_line(error)}); {what}") from None
    if not is_finite:
        raise UserError(f"{option}: {path} gives numbers that are not finite; {what}")


def load_vae(folder):
    """A pipeline's VAE, which has decoded a latent."""
    kind = read_config(folder, "vae", "--model")["_class_name"]
    vae = load_network({"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}[kind],
                       folder, "vae")
    latent = torch.zeros(1, vae.config.latent_channels, 2, 2)
    check_call(os.path.join(folder, "vae"), "--model", lambda: vae.decode(latent).sample)
    return vae


def load_unet(folder, option):
    """A UNet, which has been called with the smallest latent that it takes."""
    unet = load_network(UNet2DConditionModel, folder, "unet", option)
    config, width = unet.config, unet.config.cross_attention_dim
    side = 2 ** (len(config.block_out_channels) - 1)
    latent = torch.zeros(1, config.in_channels, side, side)
    text = torch.zeros(1, 2, width if isinstance(width, int) else width[0])
    check_call(os.path.join(folder, "unet"), option, lambda: unet(latent, 1, text).sample)
    return unet


def load_text(folder):
    """A pipeline's (tokenizer, text encoder), which have read a text."""
    encoder = load_network(CLIPTextModel, folder, "text_encoder")
    tokenizer = load_tokenizer(os.path.join(folder, "tokenizer"), encoder.config)

    def read():
        ids = tokenizer(["a"], padding="max_length", return_tensors="pt",
                        max_length=encoder.config.max_position_embeddings).input_ids
        return encoder(ids).last_hidden_state
    check_call(f"{folder}/text_encoder with tokenizer/", "--model", read,
               "get the model's whole folder")
    return tokenizer, encoder


def load_tokenizer(folder, encoder, option="--model"):
    """CLIP's tokenizer of a folder, which tells words apart; encoder: its text model's config."""
    check_tokenizer(folder, option)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        vocabulary = tokenizer.get_vocab()
        ids = tokenizer("").input_ids
        # the words that were learned last need the whole list of merges
        words = [word for word in sorted(vocabulary, key=vocabulary.get, reverse=True)
                 if word.endswith("</w>") and len(word) > 5 and word[:-4].isalpha()
                 and word.isascii()][:20]
        are_read = any(tokenizer(word[:-4]).input_ids[1:-1] == [vocabulary[word]]
                       for word in words)
        length = int(tokenizer.model_max_length)
    except Exception as error:                          # a broken file's errors are of any kind
        raise UserError(f"{option}: {folder} is no usable tokenizer ({first_line(error)}); "
                        "get the model's whole folder") from None
    if not are_read:
        raise UserError(f"{option}: {folder} does not tell words apart: its vocabulary of "
                        f"{len(vocabulary)} tokens or its merges are cut off; get the model's "
                        "whole folder")
    if len(ids) != 2 or max(vocabulary.values()) >= encoder.vocab_size:
        raise UserError(f"{option}: {folder} has {len(vocabulary)} tokens, and its text encoder "
                        f"knows {encoder.vocab_size}; they are of different models")
    if length < 3:
        raise UserError(f"{option}: model_max_length in {folder}/tokenizer_config.json is "
                        f"{tokenizer.model_max_length}; 77 is usual")
    return tokenizer


def load_clip(name, option="--model"):
    """CLIP's (model, tokenizer, mean, standard deviation) of a folder or hub id.

    The last two are three numbers each, of pictures in 0..1.
    """
    folder = local_folder(name, option, CLIP_FILES)
    kind = read_json(os.path.join(folder, "config.json"), option).get("model_type")
    if kind != "clip":
        raise UserError(f"{option}: {name} is of the type {kind}; a CLIPModel's folder is needed, "
                        "such as openai/clip-vit-large-patch14")
    check_finite(folder, "model", option)
    config = os.path.join(folder, "preprocessor_config.json")
    colours = read_json(config, option)
    for key in ("image_mean", "image_std"):
        values = colours.get(key)
        if not isinstance(values, list) or len(values) != 3 or not all(map(is_number, values)):
            raise UserError(f"{option}: {key} in {config} is {values!r}; a number each for red, "
                            "green and blue is needed")
    model = load_network(CLIPModel, folder, option=option)
    tokenizer = load_tokenizer(folder, model.config.text_config, option)
    return model, tokenizer, colours["image_mean"], colours["image_std"]
