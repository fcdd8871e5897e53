"""A base and a checkpoint's parts, read whole or refused with one sentence.

check_weights looks before anything heavy is loaded; the loaders look again at what arrived, since
from_pretrained only warns where a network's file lacks weights, and fills in random ones.
"""
import os
import re
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ModelMixin, UNet2DConditionModel
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from plumbing.bases import check_base, check_noise, check_tokenizer, check_unet, is_number
from plumbing.formats import (
    CLIP_FILES,
    PEFT_FILE,
    STEMS,
    local_folder,
    read_config,
    read_shapes,
    recognise,
    weight_files,
)
from plumbing.loras import call_small, read_lora, read_numbers
from plumbing.options import UserError, first_line
from plumbing.worlds import read_json

# what a text encoder's file may hold beside it, where it was cut out of a CLIP
POSITIONS = re.compile(r".*position_ids")
OF_CLIP = re.compile(r"(vision_model\.|text_projection|visual_projection|logit_scale).*|"
                     + POSITIONS.pattern)


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
    found = [(path, weight, recognise(path)) for path, weight in parts]
    for path, _ in parts:
        if os.path.isdir(path) and not os.path.samefile(path, base):
            check_noise(path, base)
            check_same(path, base)
    whole = [(path, weight) for path, weight, held in found if "unet" in dict(held)]
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
        for _ in numbers_of(os.path.join(unet if is_parts else base, part), stem,
                            option if is_parts else "--model"):
            pass                                        # each is finite
    loras = [(halves, weight) for path, weight, held in found
             for halves in read_loras(path, held, shapes)]
    return Weights(base, unet, option, loras)


def read_loras(path, held, shapes):
    """A part's LoRAs, one a network: a folder may hold the same one in several forms."""
    files = [place for kind, place in held if kind == "lora"]
    loras = [read_lora(file, shapes) for file in files]
    networks = [network for halves in loras for network in halves]
    if len(networks) > len(set(networks)):
        raise UserError(f"--checkpoint: {path} holds several LoRAs of one network, "
                        f"{' and '.join(os.path.relpath(file, path) for file in files)}; give one "
                        "of these files")
    return loras


def check_same(part, base, option="--checkpoint"):
    """UserError where a part has a text encoder or VAE of its own, other than the base's."""
    for name in ("text_encoder", "vae"):
        folders = [os.path.join(holder, name) for holder in (part, base)]
        if not os.path.isdir(folders[0]) or os.path.isfile(os.path.join(folders[0], PEFT_FILE)):
            continue
        own, bases = ({todays_name(key): tensor
                       for key, tensor in numbers_of(folder, STEMS[name], option)
                       if not POSITIONS.fullmatch(key)} for folder in folders)
        if own.keys() != bases.keys() or not all(       # half precision rounds to 2^-8 at most
                torch.allclose(own[key], bases[key], rtol=2 ** -8, atol=1e-6) for key in own):
            raise UserError(f"{option}: {part} has a {name}/ of its own, which is not the base's "
                            f"and would not be used; give {part} as --model, or take {name}/ out")


OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def todays_name(key):
    """A weight's name as the libraries of today save it: text encoders' and VAEs' were renamed."""
    key = key.removeprefix("text_model.")
    return re.sub(r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.",
                  lambda found: f"{found[1]}{OLDER[found[2]]}.", key)


def numbers_of(folder, stem, option):
    """(name, tensor float32) of a network's weights, which are finite (seconds for SD)."""
    for path in weight_files(folder, stem, option):
        try:
            yield from read_numbers(path)
        except ValueError as error:
            raise UserError(f"{option}: {path} can't be used: {error}; get the file "
                            "again") from None


# ---- loading -------------------------------------------------------------------------------------

def load_network(cls, folder, subfolder="", option="--model"):
    """A network of a folder, or of one inside it, with all its weights from there."""
    path = os.path.join(folder, subfolder)
    dtype = "torch_dtype" if issubclass(cls, ModelMixin) else "dtype"       # not the config's
    try:
        network, info = cls.from_pretrained(path, use_safetensors=True, output_loading_info=True,
                                            **{dtype: torch.float32})
    except MemoryError:
        raise
    except Exception as error:                          # a broken config's errors are of any kind
        raise UserError(f"{option}: {path} is not usable ({first_line(error)})") from None
    missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if missing:
        raise UserError(f"{option}: {path} lacks {len(missing)} of its weights or has them in "
                        f"another shape, such as {missing[0]}; get the whole file")
    may_be_left = OF_CLIP if cls is CLIPTextModel else POSITIONS
    left = sorted(name for name in info["unexpected_keys"] if not may_be_left.fullmatch(name))
    if left:
        raise UserError(f"{option}: {path} has {len(left)} weights without a place, such as "
                        f"{left[0]}; its config.json is another model's")
    return network.requires_grad_(False).eval()


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
    """A UNet, which has been called with a small latent."""
    unet = load_network(UNet2DConditionModel, folder, "unet", option)
    check_call(os.path.join(folder, "unet"), option, lambda: call_small(unet))
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
        words = last_words(vocabulary, 20)
        are_read = words and all(tokenizer(word).input_ids[1:-1] == [vocabulary[f"{word}</w>"]]
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


def last_words(vocabulary, count):
    """The words that a tokenizer learned last, which it reads only by its whole list of merges."""
    return [word[:-4] for word in sorted(vocabulary, key=vocabulary.get, reverse=True)
            if word.endswith("</w>") and len(word) > 5 and word[:-4].isalpha()
            and word.isascii()][:count]


def load_clip(name, option="--model"):
    """CLIP's (model, tokenizer, mean, standard deviation) of a folder or hub id.

    The last two are three numbers each, of pictures in 0..1.
    """
    folder = local_folder(name, option, CLIP_FILES)
    kind = read_json(os.path.join(folder, "config.json"), option).get("model_type")
    if kind != "clip":
        raise UserError(f"{option}: {name} is of the type {kind}; a CLIPModel's folder is needed, "
                        "such as openai/clip-vit-large-patch14")
    for _ in numbers_of(folder, "model", option):
        pass                                            # each is finite
    config = os.path.join(folder, "preprocessor_config.json")
    colours = read_json(config, option)
    mean, std = colours.get("image_mean"), colours.get("image_std")
    for key, values, low in (("image_mean", mean, 0), ("image_std", std, 1e-3)):
        if not isinstance(values, list) or len(values) != 3 or not all(
                is_number(value) and low <= value <= 1 for value in values):
            raise UserError(f"{option}: {key} in {config} is {values!r}; a number each for red, "
                            "green and blue is needed, of pictures in 0..1")
    model = load_network(CLIPModel, folder, option=option)
    tokenizer = load_tokenizer(folder, model.config.text_config, option)
    check_call(folder, option, lambda: tell_apart(model, tokenizer))
    return model, tokenizer, mean, std


def tell_apart(model, tokenizer):
    """CLIP's unit embeddings of two pictures and of two words; ValueError where two are alike."""
    size = model.config.vision_config.image_size
    pictures = torch.linspace(-1, 1, 3 * size * size).view(1, 3, size, size)
    words = tokenizer(last_words(tokenizer.get_vocab(), 2), return_tensors="pt")
    found = (model.get_image_features(pixel_values=torch.cat([pictures, pictures.flip(3)])),
             model.get_text_features(**words))
    found = [normalize(getattr(one, "pooler_output", one), dim=-1) for one in found]
    for what, (one, other) in zip(("pictures", "texts"), found, strict=True):
        if torch.allclose(one, other, atol=1e-6):
            raise ValueError(f"it can't tell {what} apart")
    return torch.cat(found)
