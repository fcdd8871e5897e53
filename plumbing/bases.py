"""Which base models can be drawn with, told by the configs of their parts before any is loaded."""
import math
import os

from plumbing.checkpoints import LORA_FILE
from plumbing.formats import ONLY, PEFT_FILE, STEMS, read_config, read_shapes
from plumbing.options import UserError
from plumbing.worlds import read_json

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


# ---- noise ---------------------------------------------------------------------------------------

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
