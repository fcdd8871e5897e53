"""Stable Diffusion as a policy: encode, predict, decode, LoRA, save, load.

Loads any folder or hub id in Stable Diffusion 1.x's format, `tiny/` among them, part by part; the
safety checker is never loaded, since a blackened picture would count as a safe one.
"""
import hashlib
import json
import os
import shutil
from contextlib import contextmanager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ddpo import ddim_schedule
from prompts import UserError

LORA_TARGETS = {"attention": ["to_q", "to_k", "to_v", "to_out.0"],
                "all": ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
                        "conv1", "conv2", "conv_shortcut", "time_emb_proj"]}
LORA_FILE = "pytorch_lora_weights.safetensors"
CONCEPTS = {"tiny": "peach, stuffed flatbread, full moon, brown circle, tangerine, egg, dvd", "": "nudity, sexual"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Policy:
    """The five parts of a pipeline, the UNet as the policy.

    model: a folder or hub id; checkpoint: None, or a folder of train.py's or erase.py's (LoRA or unet/),
    or a LoRA file in diffusers' or kohya's form. dtype is what the network computes in; latents,
    log-probabilities and trained weights are float32 always; with trainable, call train() next.
    """

    def __init__(self, model, checkpoint=None, device="cpu", dtype=torch.float32, trainable=False):
        from diffusers import AutoModel, DDIMScheduler, UNet2DConditionModel
        from safetensors import SafetensorError
        from transformers import CLIPTextModel, CLIPTokenizer
        self.device, self.dtype = torch.device(device), dtype
        self.narrow = self.device.type == "cpu" and dtype == torch.bfloat16

        def part(cls, subfolder, folder=model, option="--model", **options):
            try:
                loaded = cls.from_pretrained(folder, subfolder=subfolder, **options)
            except (OSError, ValueError, RuntimeError, SafetensorError) as error:
                raise UserError(missing(folder, subfolder, error, option)) from None
            if isinstance(loaded, torch.nn.Module):
                loaded.requires_grad_(False).eval().to(device)
            return loaded

        whole = checkpoint and os.path.isdir(os.path.join(checkpoint, "unet"))
        self.tokenizer = part(CLIPTokenizer, "tokenizer")
        self.text_encoder = part(CLIPTextModel, "text_encoder", use_safetensors=True).to(dtype)
        self.vae = part(AutoModel, "vae", use_safetensors=True).float()
        source = (checkpoint, "--checkpoint") if whole else ()
        self.unet = part(UNet2DConditionModel, "unet", *source, use_safetensors=True).float()
        if checkpoint and not whole:
            load_lora(self.unet, checkpoint)
        if not trainable:
            self.lower()
        # SD 1.4 ships PNDM's configuration: the same betas; DDIM's last step must keep its noise
        self.scheduler = DDIMScheduler.from_config(part(DDIMScheduler, "scheduler").config, clip_sample=False,
                                                   set_alpha_to_one=False, steps_offset=1)
        self.prediction_type = self.scheduler.config.prediction_type
        self.concept = CONCEPTS.get(os.path.basename(os.path.normpath(model)), CONCEPTS[""])    # what guides steer away from
        self.compiled = {}                              # rows of a call -> a compiled UNet
        self.states = {}                                # (text, its own states' place) -> text states (L, D)

    def latent_shape(self, resolution=None):
        """(C, h, w) of a picture of `resolution` pixels, or of the model's own size."""
        size = self.unet.config.sample_size
        if resolution:
            vae = self.vae.config
            widths = getattr(vae, "decoder_block_out_channels", None) or vae.block_out_channels
            size = resolution // 2 ** (len(widths) - 1)
        return self.unet.config.in_channels, size, size

    def schedule(self, steps, eta):
        try:
            self.scheduler.set_timesteps(steps)
            rows = ddim_schedule(self.scheduler.alphas_cumprod, self.scheduler.timesteps, eta)
        except (ValueError, IndexError) as error:
            raise UserError(f"--steps, --eta: {steps} steps with eta {eta:g} don't fit this scheduler "
                            f"({error})") from None
        return type(rows)(*(row.to(self.device) for row in rows))

    @torch.no_grad()
    def encode(self, prompts):
        """Texts -> text states (B, L, D). Frozen, so every text is encoded once; a Prompt may bring its own."""
        names = [(str(p), getattr(p, "states", None)) for p in prompts]
        for text, given in [name for name in dict.fromkeys(names) if name not in self.states]:
            length = min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)
            if given:
                self.states[text, given] = self.given_states(*given[:2])
            else:
                ids = self.tokenizer([text], padding="max_length", truncation=True, max_length=length,
                                     return_tensors="pt").input_ids         # alone: the same in any company
                self.states[text, given] = self.text_encoder(ids.to(self.device)).last_hidden_state[0]
        return torch.stack([self.states[name] for name in names])

    def given_states(self, path, name):
        """Text states (L, D) that an attack wrote."""
        from safetensors import SafetensorError, safe_open
        try:
            with safe_open(path, "pt") as file:
                states = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"--prompts: {path} has no text states {name!r} ({first_line(error)})") from None
        wanted = self.encode([""])[0].shape
        if states.shape != wanted:
            raise UserError(f"--prompts: {path} has text states {tuple(states.shape)}; this model's are {tuple(wanted)}")
        return states.to(self.device, next(self.text_encoder.parameters()).dtype)

    def unet_output(self, x, t, text):
        """The network's output (B, C, h, w), float32, for latents x, one timestep t, states text."""
        unet = self.compiled.get(len(x), self.unet)
        # PyTorch's fused attention learns slowly in bf16 on a CPU: 1.2 times the whole backward's time
        attention = sdpa_kernel(SDPBackend.MATH) if self.narrow else nullcontext()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32), attention:
            return unet(x.to(self.dtype), t, text.to(self.dtype)).sample.float()

    def compile(self, sizes, resolution=None):
        """torch.compile the UNet for calls of these many rows of `resolution` pixels, now; other sizes (a last, smaller batch) stay eager."""
        compiled = torch.compile(self.unet, dynamic=False)
        self.compiled = dict.fromkeys(sizes, compiled)
        text = self.encode([""])
        for rows in sizes:
            x = torch.zeros(rows, *self.latent_shape(resolution), device=self.device)
            many = text.expand(rows, -1, -1).contiguous()
            with torch.no_grad():                       # sampling: one timestep for all
                self.unet_output(x, torch.tensor(1, device=self.device), many)
            self.unet_output(x, torch.ones(rows, dtype=torch.int64, device=self.device), many).sum().backward()
        self.unet.zero_grad()

    @torch.no_grad()
    def decode(self, latents):
        """Latents (N, C, h, w) -> pictures uint8 (N, H, W, 3), a few at a time to bound memory: 16 of 64 pixels, 4 of 512."""
        chunk = 16 if latents[0, 0].numel() < 4096 else 4
        scaled = latents.float() / self.vae.config.scaling_factor
        pictures = [self.vae.decode(part).sample for part in scaled.split(chunk)]
        pictures = (torch.cat(pictures) / 2 + .5).clamp(0, 1)
        return (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def fingerprint(self):
        """SHA-256 of all that decides a latent: weights, dtype, tokenizer, noise schedule."""
        config = {k: v for k, v in self.scheduler.config.items() if not k.startswith("_")}
        digest = hashlib.sha256(json.dumps([str(self.dtype), sorted(self.tokenizer.get_vocab().items()), config],
                                           sort_keys=True).encode())
        for module in (self.text_encoder, self.unet):
            for name, value in sorted(module.state_dict().items()):
                digest.update(f"{name} {tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    # ---- what is trained -------------------------------------------------------------------------

    def train(self, trainable, rank=4, targets="attention"):
        """Make "lora" or "full" trainable; returns the trained parameters (float32) by name.

        targets: the LoRA's layers, a name in LORA_TARGETS or a regular expression.
        """
        if trainable == "full":
            self.unet.requires_grad_(True)
        else:
            from peft import LoraConfig
            # alpha == rank, so that a loader which forgets alpha still draws the same picture
            self.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian",
                                             target_modules=LORA_TARGETS.get(targets, targets)))
        self.lower()
        return {name: p for name, p in self.unet.named_parameters() if p.requires_grad}

    @contextmanager
    def base(self):
        """Within it the UNet is the base's: the LoRA is off."""
        self.unet.disable_adapters()
        try:
            yield
        finally:
            self.unet.enable_adapters()

    def lower(self):
        """Frozen base weights to the computing dtype; what is or was trained stays float32. Channels-last, but for bf16 on a CPU, which is
        a tenth faster without."""
        for name, p in self.unet.named_parameters():
            if not p.requires_grad and "lora_" not in name:
                p.data = p.data.to(self.dtype)
        self.unet.to(memory_format=torch.contiguous_format if self.narrow else torch.channels_last)

    def save(self, folder, card):
        """Write the checkpoint in diffusers' and kohya's formats with a model card (Markdown text)."""
        from safetensors import SafetensorError
        try:
            if hasattr(self.unet, "peft_config"):
                save_lora(self.unet, folder)
            else:
                self.unet.save_pretrained(os.path.join(folder, "unet.tmp"))
                shutil.rmtree(os.path.join(folder, "unet"), ignore_errors=True)
                os.rename(os.path.join(folder, "unet.tmp"), os.path.join(folder, "unet"))
            with open(os.path.join(folder, "README.md"), "w") as file:
                file.write(card)
        except (OSError, SafetensorError) as error:
            raise UserError(f"--output-dir: the model could not be written into {folder} ({first_line(error)}); "
                            "the last checkpoint stands, and the same command goes on from it") from None


def missing(model, subfolder, error, option="--model"):
    if os.path.isdir(model):
        return f"{option}: {model} has no usable {subfolder}/ in Stable Diffusion's format ({first_line(error)})"
    if os.path.sep in str(model) and str(model).count("/") == 1 and not str(model).startswith((".", "/")):
        return (f"--model: the hub does not give {model} ({first_line(error)}); "
                "give the path of a local folder with unet/, vae/, text_encoder/, tokenizer/, scheduler/")
    return (f"--model: the folder {model} does not exist; "
            "give a local folder or a hub id such as CompVis/stable-diffusion-v1-4")


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def save_lora(unet, folder):
    """Both LoRA files; each is complete or absent."""
    from diffusers.utils import convert_all_state_dict_to_peft, convert_state_dict_to_kohya
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file
    weights = {f"unet.{name}": value.detach().float().cpu().contiguous()
               for name, value in get_peft_model_state_dict(unet).items()}
    alpha = torch.tensor(float(unet.peft_config["default"].lora_alpha))
    kohya = convert_state_dict_to_kohya(convert_all_state_dict_to_peft(dict(weights)))
    kohya = {k: alpha.clone() if k.endswith(".alpha") else v.clone() for k, v in kohya.items()}
    for name, tensors in ((LORA_FILE, weights), (LORA_FILE.replace(".", "_kohya."), kohya)):
        path = os.path.join(folder, name)
        save_file(tensors, path + ".tmp", metadata={"format": "pt"})
        os.chmod(path + ".tmp", 0o644)
        os.replace(path + ".tmp", path)


def load_lora(unet, path):
    """Put a LoRA (a folder with LORA_FILE, or a safetensors file of either form) on the UNet."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader
    from safetensors import SafetensorError
    file = os.path.join(path, LORA_FILE) if os.path.isdir(path) else path
    if not os.path.isfile(file):
        raise UserError(f"--checkpoint: {path} holds neither {LORA_FILE} nor unet/")
    try:
        state, alphas = Loader.lora_state_dict(os.path.dirname(file) or ".", weight_name=os.path.basename(file),
                                               use_safetensors=True, local_files_only=True)
        state = {k: v for k, v in state.items() if k.startswith("unet.")}
        if not state:
            raise ValueError("it has no weights for a UNet")
        Loader.load_lora_into_unet(state, alphas, unet)
    except (RuntimeError, ValueError, OSError, KeyError, SafetensorError) as error:
        raise UserError(f"--checkpoint: {file} does not fit this model ({first_line(error)})") from None
    found = sum("lora_A" in name or "lora_B" in name for name, _ in unet.named_parameters())
    if found != sum(v.ndim > 1 for v in state.values()):        # two matrices a layer; alphas are scalars
        raise UserError(f"--checkpoint: {file} does not fit this model "
                        "(only some of its weights have a place)")
    unet.requires_grad_(False)
