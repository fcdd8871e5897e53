"""Which weights can be read: what a file or folder is, told by its configs, names and shapes.

No network is loaded, and torch is not needed. What can't be read ends in one sentence that says
what was found. recognise is where another form of a checkpoint becomes one that is read.
"""
import math
import os
import re

from safetensors import SafetensorError, safe_open

from plumbing.checkpoints import LORA_FILE
from plumbing.options import UserError, first_line
from plumbing.worlds import locate, read_json

PEFT_FILE = "adapter_model.safetensors"
KOHYA_FILE = LORA_FILE.replace(".", "_kohya.")          # a second form of the file beside it
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model",
         "text_encoder": "model"}
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
LORA_PICKLES = ("pytorch_lora_weights.bin", "adapter_model.bin")
ONLY = "give a folder or hub id of Stable Diffusion 1.x's or 2.x's form"

# What a hub's repository is asked for.
PIPELINE_FILES = ["model_index.json", "scheduler/*.json", "tokenizer/*.json", "tokenizer/*.txt",
                  *(f"{part}/{name}" for part, stem in STEMS.items()
                    for name in ("config.json", f"{stem}.safetensors", f"{stem}-*.safetensors",
                                 f"{stem}.safetensors.index.json"))]
CLIP_FILES = ["*.json", "merges.txt", "model.safetensors", "model-*.safetensors"]

# Names of weights that tell what a file is; the first that is found tells.
CONTENTS = [
    (r"magnitude_vector|dora_scale", "a DoRA (a LoRA with magnitude vectors)"),
    (r"\.hada_", "a LoHa, not a LoRA"),
    (r"\.lokr_", "a LoKr, not a LoRA"),
    (r"\.oft_|oft_blocks|\.boft_", "an OFT, not a LoRA"),
    (r"\.on_input$|ia3_l", "an IA3, not a LoRA"),
    (r"\.lora_mid\.", "a LoCon with a third matrix per layer"),
    (r"\.(diff|diff_b|w_norm|b_norm)$", "differences of whole weights, not a LoRA"),
    (r"lora_(B|up)\S*\.bias$", "a LoRA with biases"),
    (r"modules_to_save", "a LoRA with whole layers beside it (modules_to_save)"),
    (r"^lora_controlnet", "a Control-LoRA"),
    (r"text_encoder_2|lora_te2_|add_embedding.*lora|label_emb.*lora", "an SDXL LoRA"),
    (r"^diffusion_model\.(input|middle|output)_block", "a LoRA with ComfyUI's names of layers"),
    (r"^(diffusion_model|transformer)\.|lora_transformer|(double|single)_blocks.*lora",
     "a LoRA of another architecture (SD 3, Flux or the like)"),
    (r"motion_modules", "a motion module (AnimateDiff)"),
    (r"^conditioner\.embedders\.1", "a single-file checkpoint of SDXL"),
    (r"^cond_stage_model\.model\.", "a single-file checkpoint of Stable Diffusion 2.x"),
    (r"^cond_stage_model\.transformer\.", "a single-file checkpoint of Stable Diffusion 1.x"),
    (r"^model\.diffusion_model\.", "a single-file checkpoint's UNet"),
    (r"^emb_params$|^string_to_param|^<", "a textual inversion"),
    (r"image_proj\.|ip_adapter", "an IP-Adapter"),
    (r"controlnet_cond_embedding", "a ControlNet"),
    (r"^(unet\.)?conv_in\.weight$", "a whole UNet's state dict"),
    (r"^(unet\.)?(down_blocks|mid_block|up_blocks)\.(?!.*lora)", "some of a UNet's own weights"),
    (r"^(decoder|encoder)\.conv_in\.", "a VAE's weights"),
    (r"^(text_model|encoder\.layers)\.(?!.*lora)", "a text encoder's weights"),
    (r"\.lora_[AB]\S*\.weight$|lora\S*[._](down|up)\.weight$", "a LoRA"),
]


def check_spacing(timesteps, count):
    """ValueError where the denoising steps leave out a part of a scheduler's `count` timesteps.

    timesteps: a list, falling. Its spacing is rounded down to whole numbers, so that 600 steps of
    1000 timesteps would start at the 600th, far below the noise that a picture starts from.
    """
    left_out = count - timesteps[0] - count / max(2, len(timesteps))
    if left_out > .15 * count or timesteps[-1] < 0:
        fitting = [n for n in range(2, count) if count % n == 0]
        near = min(fitting, key=lambda n: abs(n - len(timesteps)))
        raise ValueError(f"they would go from timestep {timesteps[0]} of {count} to "
                         f"{timesteps[-1]}; give {near}")


# ---- files ---------------------------------------------------------------------------------------

def read_header(path, option):
    """A safetensors file's names and shapes, {name: shape}, and its metadata, {name: text}."""
    try:
        with safe_open(path, "np") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            return shapes, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{option}: {path} {damage(path, error)}") from None


def damage(path, error):
    """What is wrong with a file that is no whole safetensors file."""
    try:
        with open(path, "rb") as file:
            start = file.read(100)
    except OSError as cause:
        return f"can't be opened ({cause.strerror})"
    if not start.strip():
        return "is empty; get the file again"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer and not the weights; run git lfs pull where it came from"
    if start.startswith((b"PK", b"\x80")):
        return "is a pickle, which can run code when read; convert it to safetensors"
    if start.lstrip().startswith(b"<"):
        return "is a web page, not weights; download the file itself"
    return f"is no whole safetensors file ({first_line(error)}); get the file again"


def weight_files(folder, stem, option):
    """The paths of the safetensors files, one or several, that hold a network's weights."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    # of both transformers takes the single file, and diffusers those of the index
    if single in names and (index not in names or stem == STEMS["text_encoder"]):
        return [os.path.join(folder, single)]
    if index in names:
        files = read_json(os.path.join(folder, index), option).get("weight_map")
        if not isinstance(files, dict) or not files or not all(
                isinstance(name, str) for name in files.values()):
            raise UserError(f"{option}: {os.path.join(folder, index)} has no weight_map of names "
                            "of files; get the file again")
        return [os.path.join(folder, name) for name in sorted(set(files.values()))]
    variants = [name for name in names
                if name.startswith(f"{stem}.") and name.endswith(".safetensors")]
    pickles = [name for name in names if name.endswith(PICKLES)]
    if variants:
        found = f"only the variant {variants[0]}; copy or link it to {stem}.safetensors"
    elif pickles:
        found = f"only {pickles[0]}, a pickle; convert it to {stem}.safetensors"
    else:
        found = f"none; it holds {', '.join(names[:4]) or 'nothing'}"
    raise UserError(f"{option}: {folder} needs {stem}.safetensors and has {found}")


def read_shapes(folder, stem, option):
    """{name: shape} of all weights of a network in a folder.

    Published text encoders' names begin with text_model., the modules' in transformers do not.
    """
    shapes = {}
    for path in weight_files(folder, stem, option):
        shapes |= read_header(path, option)[0]
    return {name.removeprefix("text_model."): shape for name, shape in shapes.items()}


def what_holds(names):
    """What a file with these weights is, as far as it is known."""
    for pattern, kind in CONTENTS:
        if any(re.search(pattern, name) for name in names):
            return kind
    example = f", such as {min(names)}" if names else ""
    return f"none of the known forms: it has {len(names)} tensors{example}"


# ---- a checkpoint's parts ------------------------------------------------------------------------

def recognise(path, option="--checkpoint"):
    """What a part of a checkpoint holds: a list of ("unet", its folder) and ("lora", its file).

    A folder of train.py's or erase.py's, a pipeline, a folder of peft's, or a LoRA's file.
    UserError where a folder holds weights that would not be read.
    """
    if os.path.isfile(path):
        if path.endswith(PICKLES):
            raise UserError(f"{option}: {path} is a pickle, which can run code when read; "
                            "convert it to safetensors")
        return [("lora", path)]
    if not os.path.isdir(path):
        why = "it is a link to nothing" if os.path.islink(path) else "it does not exist"
        raise UserError(f"{option}: {path} has neither {LORA_FILE} nor unet/: {why}")
    names, unet, found = sorted(os.listdir(path)), os.path.join(path, "unet"), []
    for name in (LORA_FILE, PEFT_FILE, f"unet/{PEFT_FILE}", f"text_encoder/{PEFT_FILE}"):
        file = os.path.join(path, name)
        if os.path.isfile(file):
            found.append(("lora", file))
        elif os.path.lexists(file):
            raise UserError(f"{option}: {file} is a folder or a link to nothing; get the file")
    if os.path.isdir(unet) and ("lora", os.path.join(unet, PEFT_FILE)) not in found:
        weight_files(unet, STEMS["unet"], option)
        found.insert(0, ("unet", unet))
    if not found:
        weights = [name for name in names if name.endswith((".safetensors", *PICKLES))]
        convert = ("; convert a pickle to safetensors" if set(weights) & set(LORA_PICKLES) else
                   "; give the file, or put a UNet into a folder unet/" if weights else "")
        raise UserError(f"{option}: {path} has neither {LORA_FILE} nor unet/: it holds "
                        f"{', '.join((weights or names)[:4]) or 'nothing'}{convert}")
    if "model_index.json" in names:                     # beside it a pipeline's single-file form
        names = []
    if any(name.startswith("random_states") for name in names):     # accelerate's, of a training
        names = [name for name in names if name != "model.safetensors"]
    unread = [name for name in names                    # but an attack's text states, a second form
              if name.endswith(".safetensors") and name.replace(".safetensors", ".csv") not in names
              or name in LORA_PICKLES and name.replace(".bin", ".safetensors") not in names]
    for part in ("unet", "text_encoder"):
        if ("lora", os.path.join(path, part, PEFT_FILE)) in found:
            unread += [f"{part}/{name}" for name in sorted(os.listdir(os.path.join(path, part)))
                       if name.endswith((".safetensors", *PICKLES))]
    unread = [name for name in unread if os.path.basename(name) not in (LORA_FILE, PEFT_FILE,
                                                                        KOHYA_FILE)]
    if unread:
        raise UserError(f"{option}: {path} holds {unread[0]}, too, which is not read; take it out, "
                        "or give the one file that is meant")
    return found


# what a UNet was trained to predict, and what a scheduler is that does not say it
TRAINED_WITH = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False, "beta_start": None,
                "beta_end": None, "beta_schedule": "linear", "trained_betas": None,
                "num_train_timesteps": 1000}


def check_noise(part, base, option="--checkpoint"):
    """UserError where a part's own scheduler, if it has one, is of other noise than the base's."""
    file = os.path.join("scheduler", "scheduler_config.json")
    if not os.path.isfile(os.path.join(part, file)):
        return
    own, bases = (read_json(os.path.join(folder, file), option) for folder in (part, base))
    for key, default in TRAINED_WITH.items():
        one, other = (config.get(key, default) or default for config in (own, bases))
        if one != other:
            raise UserError(f"{option}: {key} in {part}/{file} is {one!r}, and the base's is "
                            f"{other!r}; give {part} as --model")


# ---- a base --------------------------------------------------------------------------------------

def is_hub_id(name):
    return name.count("/") == 1 and not name.startswith((".", "/"))


def local_folder(name, option="--model", files=PIPELINE_FILES):
    """The folder of a model that is given by a folder or a hub id, which is fetched."""
    folder = locate(name)
    if os.path.isdir(folder):
        return folder
    if os.path.isfile(folder):
        if folder.endswith(PICKLES):
            raise UserError(f"{option}: {name} is a single file, a pickle; {ONLY}")
        kind = what_holds(read_header(folder, option)[0])
        raise UserError(f"{option}: {name} is {kind}; {ONLY}"
                        f"{', and the LoRA with --checkpoint' if kind == 'a LoRA' else ''}")
    if not is_hub_id(name):
        example = "openai/clip-vit-large-patch14" if files is CLIP_FILES else \
            "CompVis/stable-diffusion-v1-4"
        raise UserError(f"{option}: the folder {name} does not exist; give a local folder or a "
                        f"hub id such as {example}")
    from huggingface_hub import snapshot_download
    try:
        # this asks the hub once, for ten seconds at most; without an answer it takes the cache
        return snapshot_download(name, allow_patterns=files, etag_timeout=10)
    except Exception as error:                          # whatever a network can do
        raise UserError(f"{option}: {name} is not available from the hub "
                        f"({first_line(error)}); give a local folder") from None


def read_config(folder, part, option, name="config.json"):
    """A part's config; UserError where it is missing."""
    path = os.path.join(folder, part, name)
    if not os.path.isfile(path):
        other = {"unet": "transformer", "text_encoder": "text_encoder_2"}.get(part, "")
        found = f" but {other}/ (SD 3, Flux or the like)" if other and os.path.isdir(
            os.path.join(folder, other)) else ""
        raise UserError(f"{option}: {folder} has no usable {part}/ in Stable Diffusion's format"
                        f"{found}: {part}/{name} is missing; {ONLY}")
    return read_json(path, option)


UNET_KINDS = {
    "addition_embed_type": "SDXL's or another kind's",
    "class_embed_type": "class-conditioned (an upscaler's, unCLIP's)",
    "num_class_embeds": "class-conditioned (an upscaler's)",
    "encoder_hid_dim": "one with its own text projection (DeepFloyd's, Kandinsky's)",
    "encoder_hid_dim_type": "one with its own text projection (DeepFloyd's, Kandinsky's)",
    "time_cond_proj_dim": "one with the guidance distilled in (LCM)",
}
CHANNELS = {"5": ", as depth-to-image has", "7": ", as upscaling has",
            "8": ", as InstructPix2Pix has", "9": ", as in-painting has"}
SCHEDULES = {"prediction_type": ["epsilon", "v_prediction"],
             "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
             "timestep_spacing": ["leading", "trailing", "linspace"]}
VAES = ("AutoencoderKL", "AutoencoderTiny")


def check_base(folder, option="--model"):
    """UserError where a pipeline is not one that model.py draws with."""
    parts = [name for name in ("unet", LORA_FILE, PEFT_FILE)
             if os.path.exists(os.path.join(folder, name))]
    if parts and not os.path.exists(os.path.join(folder, "text_encoder", "config.json")) \
            and not os.path.exists(os.path.join(folder, "vae")):
        raise UserError(f"{option}: {folder} is no base: it has {parts[0]} and neither "
                        "text_encoder/ nor vae/; give it with --checkpoint, and its base here")
    check_unet(folder, folder, option)
    vae = read_config(folder, "vae", option)
    if vae.get("_class_name") not in VAES:
        raise UserError(f"{option}: {folder}/vae is a {vae.get('_class_name')}; "
                        f"{' or '.join(VAES)} is needed")
    scaling = vae.get("scaling_factor", .18215)
    if not is_number(scaling) or not 1e-4 < scaling < 1e4:
        raise UserError(f"{option}: scaling_factor in {folder}/vae/config.json is {scaling!r}; a "
                        "number above 0 is needed, .18215 in Stable Diffusion")
    if vae.get("out_channels", 3) != 3:
        raise UserError(f"{option}: out_channels in {folder}/vae/config.json is "
                        f"{vae['out_channels']!r}; 3 are needed, for red, green and blue")
    check_scheduler(folder, option)
    check_tokenizer(os.path.join(folder, "tokenizer"), option)
    for part, stem in STEMS.items():
        read_shapes(os.path.join(folder, part), stem, option)


def check_unet(holder, base, option):
    """UserError where holder's unet/ is another kind's, or does not fit base's other parts."""
    config = read_config(holder, "unet", option)
    unet = os.path.join(holder, "unet")
    kind = config.get("_class_name", "UNet2DConditionModel")
    if kind != "UNet2DConditionModel":
        raise UserError(f"{option}: {unet} is a {kind}, not a UNet2DConditionModel; {ONLY}")
    for key, meaning in UNET_KINDS.items():
        if config.get(key) is not None:
            raise UserError(f"{option}: {unet} is another kind of UNet, {meaning} "
                            f"({key} is {config[key]!r}); {ONLY}")
    text = read_config(base, "text_encoder", option)
    if text.get("model_type", "clip_text_model") not in ("clip_text_model", "clip"):
        raise UserError(f"{option}: {base}/text_encoder is a {text['model_type']}, not CLIP's; "
                        f"{ONLY}")
    text = text.get("text_config", text)
    if not isinstance(text, dict) or text.get("use_attention_mask"):
        wrong = "text_config" if not isinstance(text, dict) else "use_attention_mask"
        raise UserError(f"{option}: {wrong} in {base}/text_encoder/config.json is not as in Stable "
                        f"Diffusion, whose texts are read without a mask; {ONLY}")
    taken = config.get("cross_attention_dim", 1280)
    given = text.get("hidden_size", 512)
    if any(width != given for width in (taken if isinstance(taken, list) else [taken])):
        raise UserError(f"{option}: {unet} takes text states of width {taken}, and "
                        f"{base}/text_encoder gives {given}; they are of different models")
    latent = read_config(base, "vae", option).get("latent_channels", 4)
    for key in ("in_channels", "out_channels"):
        channels = config.get(key, 4)
        if channels != latent:
            why = CHANNELS.get(str(channels), "") if key == "in_channels" else ""
            raise UserError(f"{option}: {unet} has {key} {channels}{why}, and the latents of "
                            f"{base}/vae have {latent}; {ONLY}")
    sizes = config.get("sample_size")
    pair = sizes if isinstance(sizes, list) else [sizes, sizes]
    if len(pair) != 2 or not all(type(size) is int and size > 0 for size in pair):
        raise UserError(f"{option}: sample_size in {unet}/config.json is {sizes!r}; set it to the "
                        "latents' side, an eighth of the pictures' (64 in SD 1.x) or [height, "
                        "width]")


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_scheduler(folder, option):
    """UserError where a scheduler has no noise schedule that DDIM's steps can take."""
    path = os.path.join(folder, "scheduler", "scheduler_config.json")
    config = read_config(folder, "scheduler", option, "scheduler_config.json")
    kind = config.get("_class_name", "a scheduler")
    if not isinstance(kind, str):
        raise UserError(f"{option}: _class_name in {path} is {kind!r}; DDIMScheduler is usual")
    betas = config.get("trained_betas")
    has_betas = is_number(config.get("beta_start")) and is_number(config.get("beta_end"))
    if betas is not None and not (isinstance(betas, list) and betas and all(
            is_number(beta) and 0 < beta < 1 for beta in betas)):
        raise UserError(f"{option}: trained_betas in {path} is no list of numbers between 0 and 1; "
                        "null is usual")
    if not has_betas and betas is None:
        raise UserError(f"{option}: {path} is {kind} and has no beta_start and beta_end (flow "
                        f"matching?); {ONLY}")
    if has_betas and not 0 < config["beta_start"] <= config["beta_end"] < 1:
        raise UserError(f"{option}: beta_start and beta_end in {path} are {config['beta_start']} "
                        f"and {config['beta_end']}; 0 < beta_start <= beta_end < 1 is needed, "
                        ".00085 and .012 in Stable Diffusion")
    steps = config.get("num_train_timesteps", 1000)
    if type(steps) is not int or not 1 <= steps <= 100_000:
        raise UserError(f"{option}: num_train_timesteps in {path} is {steps!r}; 1000 is usual")
    if betas and len(betas) != steps:
        raise UserError(f"{option}: trained_betas in {path} are {len(betas)} for {steps} "
                        "num_train_timesteps; one each is needed")
    for key, known in SCHEDULES.items():
        if config.get(key, known[0]) not in known:
            raise UserError(f"{option}: {key} in {path} is {config[key]!r}; "
                            f"one of {', '.join(known)} is needed")
    schedule = config.get("beta_schedule", "linear")
    if not betas and schedule != "squaredcos_cap_v2":
        power = {"linear": 1, "scaled_linear": 2}[schedule]
        low, high = (config[key] ** (1 / power) for key in ("beta_start", "beta_end"))
        betas = [(low + (high - low) * i / steps) ** power for i in range(steps)]
    kept = math.exp(sum(math.log1p(-beta) for beta in betas or []))     # in SD .0047
    if betas and not 1e-30 < kept < .9:
        raise UserError(f"{option}: {path} has {steps} timesteps at whose last {kept:.1g} of the "
                        "signal is left; 1000 with betas from .00085 to .012 are Stable "
                        "Diffusion's, which leave .005")
    if config.get("thresholding"):
        raise UserError(f"{option}: {path} has thresholding, which is for models without a VAE; "
                        "set it to false")
    if config.get("rescale_betas_zero_snr") and \
            config.get("prediction_type", "epsilon") == "epsilon":
        raise UserError(f"{option}: {path} has rescale_betas_zero_snr with prediction_type "
                        "epsilon, which has no picture at a signal of zero; set it to false, or "
                        "prediction_type to v_prediction if the UNet was trained so")


def check_tokenizer(folder, option):
    """UserError where a tokenizer's files are missing or empty."""
    def is_there(name):
        path = os.path.join(folder, name)
        return os.path.isfile(path) and os.path.getsize(path) > 2
    forms = (["tokenizer_config.json", "tokenizer.json"],
             ["tokenizer_config.json", "vocab.json", "merges.txt"])
    if not any(all(map(is_there, names)) for names in forms):
        missing = [name for name in forms[is_there("vocab.json") or is_there("merges.txt")]
                   if not is_there(name)]
        raise UserError(f"{option}: {folder} has no usable tokenizer: {' and '.join(missing)} "
                        "missing or empty; get the model's whole folder")
