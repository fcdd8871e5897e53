"""Stable Diffusion as a policy: encode, predict, decode, LoRA, save, load.

Loads any folder or hub id in Stable Diffusion 1.x's format, part by part; the safety checker is
never loaded, since a blackened picture would count as a safe one.

A guide is a function (policy, prompts, scale) -> predict(x, t): it encodes the prompts once, and
predict is then called at every step with latents x (B, C, h, w) float32 and one timestep t, or one
per row (B,). scale is a number or one per prompt (B,). `plain` is the guide of training; the
rivals' are in rivals/.
"""
import hashlib
import json
import os
import shutil
from contextlib import contextmanager, nullcontext

import torch
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import AttnProcessor
from safetensors import SafetensorError, safe_open
from transformers.utils.logging import disable_progress_bar

from ddpo import Schedule, ddim_schedule
from plumbing.bases import check_spacing
from plumbing.files import write
from plumbing.loras import add_loras, save_lora
from plumbing.options import UserError, first_line
from plumbing.weights import check_weights, load_text, load_unet, load_vae, to_precision
from plumbing.worlds import read_world

disable_progress_bar()                  # weights load in a moment

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LORA_TARGETS = {
    "attention": ATTENTION,
    "all": [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
            "conv1", "conv2", "conv_shortcut", "time_emb_proj"],
}
STATES_KEPT = 2048                      # texts whose encoding is remembered


# ---- guidance ------------------------------------------------------------------------------------

def plain(policy, prompts, scale):
    """Classifier-free guidance (arXiv 2207.12598).

    The predictions without and with the prompt are one call of the network, so that the policy
    includes guidance: gradient flows through both.
    """
    return guided(policy, policy.encode(prompts), policy.encode([""]), scale)


def guided(policy, text, away, scale):
    """A predict function: away + s (text - away); text (B, L, D), away (1, L, D).

    A scale of 1 needs the prediction with the prompt alone.
    """
    if torch.is_tensor(scale):
        scale = scale.to(text.device, non_blocking=True).view(-1, 1, 1, 1)
    elif scale == 1:
        return lambda x, t: policy.unet_output(x, t, text)
    both = torch.cat([away.expand_as(text), text])                              # (2B, L, D)

    def predict(x, t):
        output = policy.unet_output(torch.cat([x, x]), repeat(t, 2), both)      # (2B, C, h, w)
        without, with_text = output.chunk(2)
        return without + scale * (with_text - without)
    return predict


def repeat(t, times):
    """Timesteps for a batch that is repeated."""
    return t.repeat(times) if t.ndim else t


def guidance_of(prompts, default):
    """The default scale where no prompt brings its own, else a tensor (B,)."""
    own = [getattr(p, "guidance", None) for p in prompts]
    if all(g is None for g in own):
        return default
    return torch.tensor([default if g is None else g for g in own])


# ---- the policy ----------------------------------------------------------------------------------

class Policy:
    """A pipeline's tokenizer, text encoder, VAE, scheduler and UNet; the UNet is the policy.

    model: a folder or hub id. parts: (path, weight) pairs (plumbing.checkpoints.Checkpoint.parts),
    each a folder of train.py's or erase.py's (a LoRA or unet/) or a LoRA file in diffusers',
    kohya's or peft's form; LoRAs add, each times its weight, and may be partly the text encoder's.
    dtype is what the network computes in; latents, log-probabilities and trained weights are
    float32 always. trainable: whether make_trainable is called next, which then sets the precision.
    """

    def __init__(self, model, parts=(), device="cpu", dtype=torch.float32, trainable=False):
        self.device, self.dtype = torch.device(device), dtype
        self.is_bf16_on_cpu = self.device.type == "cpu" and dtype == torch.bfloat16
        self.world = read_world(model)
        self.concept = self.world.concept               # what guides and edits steer away from
        weights = check_weights(model, parts)           # what can't be read whole ends here
        self.vae = load_vae(weights.base).to(self.device)
        self.tokenizer, self.text_encoder = load_text(weights.base)
        self.unet = load_unet(weights.unet, weights.unet_option)
        for name in ("text_encoder", "unet"):           # each LoRA may have a half for either
            network = getattr(self, name).to(self.device)
            add_loras(network, [(halves[name], weight) for halves, weight in weights.loras
                                if name in halves])
        if self.is_bf16_on_cpu:                         # there fused attention learns slowly
            self.unet.set_attn_processor(AttnProcessor())
        to_precision(self.text_encoder, dtype)
        if not trainable:
            self.set_precision()
        # the betas are the same whatever sampler a model comes with (SD 1.4: PNDM); steps_offset 1
        # keeps the noise of DDIM's last step, without which it has no log-probability; DDIM does
        # not draw with the spacing linspace (Euler's, DPM++'s), whose last step is no step
        self.scheduler = DDIMScheduler.from_config(
            DDIMScheduler.load_config(weights.base, subfolder="scheduler"),
            clip_sample=False, steps_offset=1, set_alpha_to_one=False)
        if self.scheduler.config.timestep_spacing == "linspace":
            self.scheduler.register_to_config(timestep_spacing="leading")
        self.prediction_type = self.scheduler.config.prediction_type
        self.compiled = {}                              # rows of a call -> a compiled UNet
        self.states = {}                                # what encode has encoded: key -> (L, D)

    @property
    def text_length(self):
        """Tokens of a text, with its start, end and padding."""
        return min(self.tokenizer.model_max_length,
                   self.text_encoder.config.max_position_embeddings)

    @property
    def pixels(self):
        """How many of a picture's pixels, along a side, are one of its latent's."""
        vae = self.vae.config
        widths = getattr(vae, "decoder_block_out_channels", None) or vae.block_out_channels
        return 2 ** (len(widths) - 1)

    def latent_shape(self, resolution=None):
        """(C, h, w) of a picture of `resolution` pixels a side, or of the model's own size."""
        size = resolution // self.pixels if resolution else self.unet.config.sample_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return self.unet.config.in_channels, height, width

    def schedule(self, steps, eta=1.):
        """The denoising steps of a picture, a ddpo.Schedule on the policy's device.

        UserError for a number of steps that the scheduler's spacing rounds away.
        """
        try:
            self.scheduler.set_timesteps(steps)
            check_spacing(self.scheduler.timesteps.tolist(), len(self.scheduler.alphas_cumprod))
            rows = ddim_schedule(self.scheduler.alphas_cumprod, self.scheduler.timesteps, eta)
        except (ValueError, IndexError) as error:
            raise UserError(f"--steps, --eta: {steps} steps with eta {eta:g} do not fit this "
                            f"scheduler ({error})") from None
        return Schedule(*(row.to(self.device) for row in rows))

    # ---- encode, predict, decode -----------------------------------------------------------------

    @torch.no_grad()
    def encode(self, prompts):
        """Texts -> text states (B, L, D). The encoder is frozen, so each text is encoded once.

        A Prompt with text states of its own has these.
        """
        keys = [(str(p), getattr(p, "states", None)) for p in prompts]
        if len(self.states) > STATES_KEPT:              # of COCO's captions all would be gigabytes
            self.states.clear()
        for text, given in dict.fromkeys(keys):
            if (text, given) not in self.states:
                states = self.given_states(*given[:2]) if given else self.text_states(text)
                self.states[text, given] = states
        return torch.stack([self.states[key] for key in keys])

    def text_states(self, text):
        """One text's states (L, D), encoded alone: the same in any batch."""
        ids = self.tokenizer([text], padding="max_length", truncation=True,
                             max_length=self.text_length, return_tensors="pt").input_ids
        return self.text_encoder(ids.to(self.device)).last_hidden_state[0]

    def given_states(self, path, name):
        """Text states (L, D) that an attack wrote."""
        try:
            with safe_open(path, "pt") as file:
                states = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"--prompts: {path} has no text states {name!r} "
                            f"({first_line(error)})") from None
        wanted = self.text_states("").shape
        if states.shape != wanted:
            raise UserError(f"--prompts: {path} has text states {tuple(states.shape)}; "
                            f"this model's are {tuple(wanted)}")
        if not states.isfinite().all():
            raise UserError(f"--prompts: {path} has text states {name!r} that are not finite; "
                            "make the file again")
        return states.to(self.device, self.text_encoder.dtype)

    def unet_output(self, x, t, text):
        """The network's output (B, C, h, w), float32, for latents x, timestep t, states text."""
        unet = self.compiled.get(len(x), self.unet)
        t = t.expand(len(x)).contiguous()               # always, so that one graph serves
        in_half = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=in_half):
            return unet(x.to(self.dtype), t, text.to(self.dtype)).sample.float()

    @torch.no_grad()
    def decode(self, latents):
        """Latents (N, C, h, w) -> pictures uint8 (N, H, W, 3), a few at a time to bound memory.

        A picture is black where its latent is not finite.
        """
        chunk = 16 if latents[0, 0].numel() < 4096 else 4       # of 64 pixels a side; of 512
        scaled = latents.float() / self.vae.config.scaling_factor
        pictures = [self.vae.decode(part).sample for part in scaled.split(chunk)]
        pictures = (torch.cat(pictures) / 2 + .5).clamp(0, 1)                   # 0..1
        is_finite = latents.isfinite().flatten(1).all(1).view(-1, 1, 1, 1)
        pictures = pictures.where(is_finite, 0.)
        return (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def compile(self, rows, with_base=True):
        """torch.compile the UNet for calls of so many rows, now; others stay eager.

        Whatever the calls differ in has a graph of its own: with and without gradient, and the
        base's (with_base).
        """
        self.compiled = {rows: torch.compile(self.unet, dynamic=False)}
        x = torch.zeros(rows, *self.latent_shape(), device=self.device)
        t, text = torch.tensor(1, device=self.device), self.encode([""] * rows)
        try:
            self.unet_output(x, t, text).sum().backward()
            with torch.no_grad():
                self.unet_output(x, t, text)
                with self.base() if with_base else nullcontext():
                    self.unet_output(x, t, text)
        except Exception as error:                      # no compiler, a kernel that it can't make
            raise UserError(f"--compile: PyTorch can't compile the UNet here "
                            f"({first_line(error)}); leave it out") from None
        self.unet.zero_grad()

    def fingerprint(self):
        """SHA-256 of all that decides a latent: weights, dtype, tokenizer, noise schedule."""
        config = {k: v for k, v in self.scheduler.config.items() if not k.startswith("_")}
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        networks = (self.text_encoder, self.unet)
        scales = {name: module.scaling for network in networks
                  for name, module in network.named_modules()
                  if hasattr(module, "lora_A")}         # a LoRA's weight is no tensor
        settings = [str(self.dtype), vocabulary, config, scales]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for module in networks:
            for name, value in sorted(module.state_dict().items()):
                digest.update(f"{name} {tuple(value.shape)}".encode())
                flat = value.detach().cpu().contiguous().view(-1)
                digest.update(flat.view(torch.uint8).numpy())
        return digest.hexdigest()

    # ---- what is trained -------------------------------------------------------------------------

    def make_trainable(self, trainable="lora", rank=4, targets="attention"):
        """Make a "lora" or all "weights" trainable: the trained parameters (float32) by name.

        targets: the LoRA's layers, a name in LORA_TARGETS or a regular expression. LoRAs that the
        policy was loaded with stay on, frozen.
        """
        if trainable == "weights":
            self.unet.requires_grad_(True)
        else:
            from peft import LoraConfig
            earlier = self.unet.active_adapters() if hasattr(self.unet, "peft_config") else []
            # alpha == rank, so that a loader which forgets alpha still draws the same picture
            self.unet.add_adapter(LoraConfig(
                r=rank, lora_alpha=rank, init_lora_weights="gaussian",
                target_modules=LORA_TARGETS.get(targets, targets)))
            for module in self.unet.modules():
                if hasattr(module, "lora_A"):           # else peft copies inputs to float32, which
                    module.cast_input_dtype_enabled = False     # autocast then copies back
                    module.set_adapter([*earlier, "default"])   # and makes all of them learn
            for name, p in self.unet.named_parameters():
                p.requires_grad_(".default." in name)
        self.set_precision()
        return {name: p for name, p in self.unet.named_parameters() if p.requires_grad}

    @contextmanager
    def base(self):
        """Within it the UNet is the base's: the LoRA is off."""
        self.unet.disable_adapters()
        try:
            yield
        finally:
            self.unet.enable_adapters()

    def set_precision(self):
        """Frozen base weights to the computing dtype; what is or was trained stays float32.

        Channels-last, but for bf16 on a CPU, which is a tenth faster without.
        """
        to_precision(self.unet, self.dtype)
        contiguous = torch.contiguous_format if self.is_bf16_on_cpu else torch.channels_last
        self.unet.to(memory_format=contiguous)

    def save(self, folder, card):
        """Write the weights in diffusers' and kohya's formats with a model card (Markdown)."""
        try:
            os.makedirs(folder, exist_ok=True)
            if hasattr(self.unet, "peft_config"):
                save_lora(self.unet, folder)
            else:
                unfinished = os.path.join(folder, "unet.tmp")
                self.unet.save_pretrained(unfinished)
                shutil.rmtree(os.path.join(folder, "unet"), ignore_errors=True)
                os.rename(unfinished, os.path.join(folder, "unet"))
        except (OSError, SafetensorError) as error:
            raise UserError(f"--output-dir: the model could not be written into {folder} "
                            f"({first_line(error)}); what was saved before stays, and the same "
                            "command can be given again") from None
        write(os.path.join(folder, "README.md"), card)
