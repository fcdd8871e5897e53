"""Which weights can be read: what a file or folder is, told by its names and shapes.

No network is loaded, and torch is not needed. What can't be read ends in one sentence that says
what was found. recognise is where another form of a checkpoint becomes one that is read.
"""
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
