"""LoRA files: read from any trainer's form, put on a network, written.

The forms differ in how a layer's name and its two matrices are spelled and in where its scale
stands: diffusers' (unet.….lora_A.weight, .lora.down.weight, processor.to_q_lora.down.weight; the
scale in the header's metadata), kohya's (lora_unet_…_to_q.lora_down.weight, an alpha per layer)
and peft's (base_model.model.….lora_A.default.weight; adapter_config.json). A file is read whole:
each of its tensors has a place in the UNet or the text encoder, or the file is refused. A layer is
found by its name after any prefix, so that a text encoder's half may stand under unet., too.
"""
import json
import math
import os
import re
import warnings
from collections import defaultdict

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from plumbing.checkpoints import LORA_FILE
from plumbing.formats import KOHYA_FILE, PEFT_FILE, read_header, what_holds
from plumbing.options import UserError
from plumbing.worlds import read_json

HALVES = {"A": "down", "B": "up", "down": "down", "up": "up"}
KEY = re.compile(r"(?P<layer>.+?)(?:\.lora_(?P<peft>[AB])(?:\.[\w.-]+)?\.weight"
                 r"|(?:[._]lora\.|\.lora_linear_layer\.|\.lora_)(?P<half>down|up)\.weight"
                 r"|\.alpha)")
PREFIXES = re.compile(r"(base_model_model_|lora_unet_|lora_te1?_|unet_|text_encoder_(?!2)"
                      r"|text_model_)+")
OLD_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
LARGEST = 1e10          # whose square's square a float32 holds; real weights are far below
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")

# peft's settings that leave a layer alpha / rank times the product of its matrices, for all of them
# that may be in a file; other settings, of which new ones come, have to be empty
PLAIN = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "peft_type", "task_type",
         "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
         "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
         "lora_dropout", "fan_in_fan_out", "init_lora_weights", "loftq_config", "eva_config",
         "corda_config", "lora_ga_config", "qalora_group_size", "megatron_core", "runtime_config",
         "ensure_weight_tying"}
PLAIN_STARTS = ("none", "true", "false", "gaussian", "orthogonal", "eva")   # others change the base


# ---- reading -------------------------------------------------------------------------------------

def read_lora(path, shapes, option="--checkpoint"):
    """A LoRA file -> {network: {layer: (down (r, in, …), up (out, r, …))}}, scale multiplied in.

    shapes: {network: {weight's name: shape}} of the base, network being "unet" or "text_encoder".
    UserError where it is not read whole.
    """
    names, metadata = read_header(path, option)
    if not any(KEY.fullmatch(name) for name in names):
        raise UserError(f"{option}: {path} has no LoRA in it: it is {what_holds(names)}")
    settings, found = read_settings(path, names, metadata, option), defaultdict(dict)
    try:
        layers, tensors = find_layers(names, layer_places(shapes)), dict(read_numbers(path))
        for (network, layer), halves in layers.items():
            if settings is not None and not settings.get(network):
                raise ValueError(f"its metadata says nothing of its layers in the {network}")
            own = {half: tensors[name] for half, name in halves.items()}
            found[network][layer] = matrices(f"{network}.{layer}", own,
                                             shapes[network][f"{layer}.weight"],
                                             settings and settings[network])
        bare = [".".join(place) for place, halves in layers.items() if "alpha" not in halves]
        if 0 < len(bare) < len(layers):
            raise ValueError(f"{len(bare)} of its {len(layers)} layers have no alpha, such as "
                             f"{min(bare)}")
    except ValueError as error:
        raise UserError(f"{option}: {path} does not fit this model or is not whole: {error}; "
                        "give a whole, plain LoRA of this base in diffusers' or kohya's "
                        "form") from None
    return dict(found)


def find_layers(names, places):
    """{(network, layer): {"down", "up" or "alpha": the tensor's name}}, each name in its place."""
    layers = defaultdict(dict)
    for name in names:
        match = KEY.fullmatch(name)
        place = match and find_place(match["layer"], places)
        if not place:
            kind = what_holds([name])
            raise ValueError(f"{name} has no place" if kind == "a LoRA" or kind.startswith("none")
                             else f"with {name} it is {kind}")
        half = HALVES.get(match["peft"] or match["half"], "alpha")
        if half in layers[place]:
            raise ValueError(f"{'.'.join(place)} has two tensors {half}, the second {name}")
        layers[place][half] = name
    return layers


def read_numbers(path):
    """(name, tensor float32) of all weights in a file; ValueError where one can't be weights."""
    with safe_open(path, "pt") as file:
        for name in file.keys():
            kind = file.get_slice(name).get_dtype()
            is_count = kind[0] in "IU" and name.endswith((".alpha", "position_ids"))
            if kind not in FLOATS and not is_count:
                raise ValueError(f"it holds {kind}, not numbers with a fraction, in {name}")
            tensor = file.get_tensor(name).float()
            if not (tensor.abs() < LARGEST).all():      # a NaN is not, either
                raise ValueError(f"it has numbers of {LARGEST:g} or more or not finite, in {name}")
            yield name, tensor


def matrices(name, halves, shape, settings):
    """A layer's (down (r, in, …), up (out, r, …) times its scale).

    halves: down, up and maybe alpha; shape: the weight's (out, in, …); settings: read_settings'.
    """
    if not {"down", "up"} <= set(halves):
        raise ValueError(f"{name} has only {' and '.join(halves)}")
    down, up = halves["down"], halves["up"]
    out, *into = shape
    rank = len(down) if down.ndim > 1 else 1
    fit = (rank, *into), (out, rank, *[1] * (len(into) - 1))
    if not rank:
        raise ValueError(f"{name} has rank 0")
    if flat(down.shape) != flat(fit[0]) or flat(up.shape) != flat(fit[1]):
        raise ValueError(f"{name} has matrices {tuple(down.shape)} and {tuple(up.shape)} where "
                         f"{fit[0]} and {fit[1]} fit")
    alpha = halves["alpha"].flatten().tolist() if "alpha" in halves else None
    if alpha is not None and (len(alpha) != 1 or alpha[0] <= 0):
        raise ValueError(f"{name} has the alpha {alpha}; one number above 0 is needed")
    try:
        scale = layer_scale(name.partition(".")[2], rank, alpha and alpha[0], settings)
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise ValueError(f"the settings that come with it: {error}") from None
    up = up * scale
    if not torch.isfinite(up.abs().max() * down.abs().max() * rank):
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


def read_settings(path, names, metadata, option):
    """{network: {"lora_alpha": …, "r": …}} of diffusers' metadata or peft's config, or None."""
    if "lora_adapter_metadata" in metadata:
        try:
            settings = json.loads(metadata["lora_adapter_metadata"]).items()
        except (ValueError, AttributeError):
            raise UserError(f"{option}: the lora_adapter_metadata of {path} is not a JSON "
                            "object") from None
        if "r" in dict(settings):                       # of one network: save_lora_adapter
            return dict.fromkeys(("unet", "text_encoder"), dict(settings))
        return {network: {key.removeprefix(f"{network}."): value for key, value in settings
                          if key.startswith(f"{network}.")}
                for network in ("unet", "text_encoder")}
    if os.path.basename(path) == PEFT_FILE or any(
            name.startswith("base_model.model.") for name in names):
        beside = os.path.join(os.path.dirname(path), "adapter_config.json")
        if not os.path.isfile(beside):
            raise UserError(f"{option}: {path} is in peft's form, whose alpha is in a file "
                            "adapter_config.json beside it, which is missing; put it there")
        return dict.fromkeys(("unet", "text_encoder"), read_json(beside, option))
    return None


def layer_scale(layer, rank, alpha, settings):
    """What a layer's product of matrices is multiplied by: alpha / rank, 1 where nothing says it.

    ValueError where the settings contradict the file or say that it is no plain LoRA.
    """
    if settings is None:
        return 1. if alpha is None else alpha / rank
    from peft.utils.other import get_pattern_key
    if alpha is not None:
        raise ValueError(f"{layer} has an alpha of its own beside them")
    if (settings.get("peft_type") or "LORA") != "LORA":
        raise ValueError(f"it is a {settings['peft_type']}, not a LoRA")
    for key, value in settings.items():
        if value not in (None, False, "none", []) and key not in PLAIN:
            raise ValueError(f"{key} is {value}, which is not read")
    if str(settings.get("init_lora_weights")).lower() not in PLAIN_STARTS:
        raise ValueError(f"init_lora_weights is {settings['init_lora_weights']}, which changes "
                         "the base")

    def of_layer(patterns, default):
        patterns = settings.get(patterns) or {}
        return patterns.get(get_pattern_key(patterns, layer), settings.get(default, 8))    # peft's
    if of_layer("rank_pattern", "r") != rank:
        raise ValueError(f"{layer} has rank {rank}, they say {of_layer('rank_pattern', 'r')!r}")
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
    with torch.no_grad():
        if not torch.isfinite(call_small(network)).all():
            raise UserError("--checkpoint: with its LoRAs and their weights the "
                            f"{type(network).__name__} gives numbers that are not finite; give "
                            "smaller weights after @, or get the files again")


def call_small(network):
    """What a UNet gives for a small latent of noise, a text encoder for its first tokens."""
    config, device = network.config, network.device
    if hasattr(config, "vocab_size"):
        ids = torch.arange(config.max_position_embeddings) % config.vocab_size
        return network(ids[None].to(device)).last_hidden_state
    noise = torch.Generator().manual_seed(0)
    side, width = 2 ** len(config.block_out_channels), config.cross_attention_dim
    latent = torch.randn(1, config.in_channels, side, side, generator=noise)
    text = torch.randn(1, 2, width if isinstance(width, int) else width[0], generator=noise)
    return network(latent.to(device), 1, text.to(device)).sample


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
    for name, tensors in ((LORA_FILE, weights), (KOHYA_FILE, kohya)):
        path = os.path.join(folder, name)
        save_file(tensors, path + ".tmp", metadata={"format": "pt"})
        os.chmod(path + ".tmp", 0o644)
        os.replace(path + ".tmp", path)
