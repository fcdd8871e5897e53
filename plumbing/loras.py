"""LoRA files: read from any trainer's form, put on a network, written.

The forms differ in how a layer's name and its two matrices are spelled and in where its scale
stands: diffusers' (unet.….lora_A.weight, .lora.down.weight, processor.to_q_lora.down.weight; the
scale in the header's metadata), kohya's (lora_unet_…_to_q.lora_down.weight, an alpha per layer)
and peft's (base_model.model.….lora_A.default.weight; adapter_config.json). A file is read whole:
each of its tensors has a place in the UNet or the text encoder, or the file is refused.
"""
import json
import math
import os
import re
import warnings
from collections import defaultdict

import torch
from safetensors.torch import load_file, save_file

from plumbing.checkpoints import LORA_FILE
from plumbing.formats import PEFT_FILE, read_header, what_holds
from plumbing.options import UserError
from plumbing.worlds import read_json

HALVES = {"A": "down", "B": "up", "down": "down", "up": "up"}
KEY = re.compile(r"(?P<layer>.+?)(?:\.lora_(?P<peft>[AB])(?:\.[\w-]+)?\.weight"
                 r"|(?:[._]lora\.|\.lora_linear_layer\.|\.lora_)(?P<half>down|up)\.weight"
                 r"|\.alpha)")
PREFIXES = re.compile(r"(base_model_model_|lora_unet_|lora_te1?_|unet_|text_encoder_(?!2)"
                      r"|text_model_)+")
OLD_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
CHANGED_BASE = ("pissa", "olora", "corda", "loftq")     # such starts subtract from the base


# ---- reading -------------------------------------------------------------------------------------

def read_lora(path, shapes, option="--checkpoint"):
    """A LoRA file -> {network: {layer: (down (r, in, …), up (out, r, …))}}, scale multiplied in.

    shapes: {network: {weight's name: shape}} of the base, network being "unet" or "text_encoder".
    UserError where it is not read whole.
    """
    names, metadata = read_header(path, option)
    if not any(KEY.fullmatch(name) for name in names):
        raise UserError(f"{option}: {path} has no LoRA in it: it is {what_holds(names)}")
    settings, found = read_settings(path, metadata, option), defaultdict(dict)
    try:
        layers = find_layers(names, layer_places(shapes))
        tensors = read_tensors(path)
        for (network, layer), halves in layers.items():
            own = {half: tensors[name] for half, name in halves.items()}
            found[network][layer] = matrices(f"{network}.{layer}", own,
                                             shapes[network][f"{layer}.weight"],
                                             settings.get(network))
    except ValueError as error:
        raise UserError(f"{option}: {path} does not fit this model or is not whole: "
                        f"{error}") from None
    return dict(found)


def find_layers(names, places):
    """{(network, layer): {"down", "up" or "alpha": the tensor's name}}, each name in its place."""
    layers = defaultdict(dict)
    for name in names:
        match = KEY.fullmatch(name)
        place = match and find_place(match["layer"], places)
        if not place:
            kind = what_holds([name])
            raise ValueError(f"{name} has no place" if kind.startswith("none of") else
                             f"with {name} it is {kind}")
        half = HALVES.get(match["peft"] or match["half"], "alpha")
        if half in layers[place]:
            raise ValueError(f"{'.'.join(place)} has two tensors {half}, the second {name}")
        layers[place][half] = name
    return layers


def read_tensors(path):
    """{name: tensor, float32}."""
    tensors = {}
    for name, tensor in load_file(path).items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} holds {tensor.dtype}, not numbers with a fraction")
        tensors[name] = tensor.float()
        if not torch.isfinite(tensors[name]).all():
            raise ValueError(f"{name} has numbers that are not finite")
    return tensors


def matrices(name, halves, shape, settings):
    """A layer's (down (r, in, …), up (out, r, …) times its scale).

    halves: down, up and maybe alpha; shape: the weight's (out, in, …); settings: read_settings'.
    """
    if not {"down", "up"} <= set(halves):
        raise ValueError(f"{name} has only {' and '.join(halves)}")
    down, up = halves["down"], halves["up"]
    out, *into = shape
    rank = len(down)
    fit = (rank, *into), (out, rank, *[1] * (len(into) - 1))
    if not rank or flat(down.shape) != flat(fit[0]) or flat(up.shape) != flat(fit[1]):
        raise ValueError(f"{name} has matrices {tuple(down.shape)} and {tuple(up.shape)} where "
                         f"{fit[0]} and {fit[1]} fit")
    alpha = halves["alpha"].flatten().tolist() if "alpha" in halves else None
    if alpha and (len(alpha) != 1 or alpha[0] <= 0):
        raise ValueError(f"{name} has the alpha {alpha}; one number above 0 is needed")
    try:
        scale = layer_scale(name.partition(".")[2], rank, alpha and alpha[0], settings)
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise ValueError(f"the settings that come with it: {error}") from None
    up = up * scale
    if not torch.isfinite(up).all():
        raise ValueError(f"{name} times its scale {scale:g} is not finite")
    return down.reshape(fit[0]), up.reshape(fit[1])


def flat(shape):
    """A shape without the ones at its end: a 1 x 1 convolution's matrix may come as a linear's."""
    shape = tuple(shape)
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def layer_places(shapes):
    """{a layer's name with underscores, as kohya writes it: (network, its name in the network)}."""
    return {PREFIXES.sub("", layer.replace(".", "_"), count=1): (network, layer)
            for network, weights in shapes.items()
            for layer, shape in ((name.removesuffix(".weight"), shape)
                                 for name, shape in weights.items() if name.endswith(".weight"))
            if len(shape) in (2, 4) and "embedding" not in layer.replace("time_embedding", "")}


def find_place(name, places):
    """(network, layer) of a layer as a file names it, or None."""
    name = name.replace(".processor", "").replace(".", "_")
    prefix = PREFIXES.match(name)
    name = name[prefix.end():] if prefix else name
    for old, new in OLD_TEXT_NAMES.items():
        if name.endswith(f"self_attn_{old}"):
            name = name.removesuffix(old) + new
    return places.get(name) or places.get(f"{name}_0")


def read_settings(path, metadata, option):
    """{network: {"lora_alpha": …, "r": …}} as diffusers' metadata or peft's config has them."""
    beside = os.path.join(os.path.dirname(path), "adapter_config.json")
    if os.path.basename(path) == PEFT_FILE and os.path.isfile(beside):
        settings = read_json(beside, option)
        return {"unet": settings, "text_encoder": settings}
    if "lora_adapter_metadata" not in metadata:
        return {}
    try:
        settings = json.loads(metadata["lora_adapter_metadata"]).items()
    except (ValueError, AttributeError):
        raise UserError(f"{option}: the lora_adapter_metadata of {path} is not a JSON "
                        "object") from None
    return {network: {key.removeprefix(f"{network}."): value for key, value in settings
                      if key.startswith(f"{network}.")} for network in ("unet", "text_encoder")}


def layer_scale(layer, rank, alpha, settings):
    """What a layer's product of matrices is multiplied by: alpha / rank, 1 where nothing says it.

    ValueError where the settings contradict the file or say that it is no plain LoRA.
    """
    if not settings:
        return 1. if alpha is None else alpha / rank
    from peft.utils.other import get_pattern_key
    if alpha is not None:
        raise ValueError(f"{layer} has an alpha of its own beside them")
    if settings.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"it is a {settings['peft_type']}, not a LoRA")
    for key, no in (("use_dora", False), ("bias", "none"), ("lora_bias", False)):
        if settings.get(key, no) not in (no, None):
            raise ValueError(f"{key} is {settings[key]}, which is not read")
    if str(settings.get("init_lora_weights")).startswith(CHANGED_BASE):
        raise ValueError(f"init_lora_weights is {settings['init_lora_weights']}, which changes "
                         "the base; convert it to a plain LoRA")

    def of_layer(patterns, default):
        patterns = settings.get(patterns) or {}
        return patterns.get(get_pattern_key(patterns, layer), settings.get(default, rank))
    if of_layer("rank_pattern", "r") != rank:
        raise ValueError(f"{layer} has rank {rank}, they say {of_layer('rank_pattern', 'r')}")
    alpha = of_layer("alpha_pattern", "lora_alpha")
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    if not 0 < scale < math.inf:
        raise ValueError(f"lora_alpha is {alpha}; a number above 0 is needed")
    return scale


# ---- putting on a network ------------------------------------------------------------------------

def add_loras(network, loras):
    """Put LoRAs on a network: they add, each times its weight; float32, and not trained.

    loras: pairs of {layer: (down, up)} and a weight. peft wants one rank an adapter.
    """
    if not loras:
        return
    from diffusers.utils.peft_utils import set_weights_and_activate_adapters
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    adapters = {}                                       # name -> (its tensors by name, weight)
    for i, (layers, weight) in enumerate(loras):
        for layer, (down, up) in layers.items():
            tensors, _ = adapters.setdefault(f"part_{i}_rank_{len(down)}", ({}, weight))
            tensors[f"{layer}.lora_A.weight"] = down
            tensors[f"{layer}.lora_B.weight"] = up
    for name, (tensors, _) in adapters.items():
        rank = len(next(iter(tensors.values())))
        layers = sorted({key.split(".lora_")[0] for key in tensors})
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=layers)
        with warnings.catch_warnings():                 # of several adapters, which is what we want
            warnings.simplefilter("ignore", UserWarning)
            inject_adapter_in_model(config, network, adapter_name=name, state_dict=tensors)
            set_peft_model_state_dict(network, tensors, adapter_name=name)
        network._hf_peft_config_loaded = True           # what diffusers' own methods ask for
        own = {key.replace(f".{name}.", "."): value for key, value in network.state_dict().items()
               if f".{name}." in key}
        if own.keys() != tensors.keys() or not all(
                torch.equal(own[key].cpu(), tensors[key]) for key in own):
            raise UserError("--checkpoint: a LoRA could not be put whole on the network: "
                            f"{len(own)} of its {len(tensors)} tensors have a place")
    set_weights_and_activate_adapters(network, list(adapters),
                                      [weight for _, weight in adapters.values()])
    network.requires_grad_(False)


# ---- writing -------------------------------------------------------------------------------------

def save_lora(unet, folder):
    """The trained LoRA in diffusers' and in kohya's form; each file is complete or absent."""
    from diffusers.utils import convert_all_state_dict_to_peft, convert_state_dict_to_kohya
    from peft import get_peft_model_state_dict
    weights = {f"unet.{name}": value.detach().float().cpu().contiguous()
               for name, value in get_peft_model_state_dict(unet).items()}
    alpha = torch.tensor(float(unet.peft_config["default"].lora_alpha))
    kohya = convert_state_dict_to_kohya(convert_all_state_dict_to_peft(dict(weights)))
    kohya = {name: alpha.clone() if name.endswith(".alpha") else value.clone()
             for name, value in kohya.items()}
    for name, tensors in ((LORA_FILE, weights), (LORA_FILE.replace(".", "_kohya."), kohya)):
        path = os.path.join(folder, name)
        save_file(tensors, path + ".tmp", metadata={"format": "pt"})
        os.chmod(path + ".tmp", 0o644)
        os.replace(path + ".tmp", path)
