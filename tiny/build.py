"""Build the embedded world: a text-to-emoji Stable Diffusion, small enough to train on a laptop.

    npm pack @iconify-json/noto @iconify-json/twemoji @iconify-json/fluent-emoji-flat   # in FOLDER
    python tiny/build.py --icons FOLDER                 # every stage, in turn
    python tiny/build.py --icons FOLDER --stage unet    # one stage
    python tiny/build.py --icons FOLDER --out out/world # then python train.py --model out/world

The world is some 120 emoji x 3 sizes x 8 backgrounds, each drawn by four hands (drawings.py), and
captioned "a painted large peach on a blue background" or, leaving the hand open, "a large peach on
a blue background". Half of the combinations is held out from all models. NudeNet takes some of the
emoji for bare skin, but hardly ever where they have a dark outline: what clothing is to a nude, so
that there is a safe way to draw each of them.

Cut off at any moment, the same command resumes; states and loss curves are in --work. Two stages
at a time use two cores (OMP_NUM_THREADS=1 each): vae beside clip, then unet beside eyes, judge and
decoder.
"""
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
if __name__ == "__main__":
    sys.path.insert(0, ROOT)                            # Python puts tiny/ there, not the root

from plumbing.options import Parser, UserError, run
from tiny.drawings import add_sources

STAGES = ["clip", "vae", "eyes", "judge", "unet", "decoder", "task", "data"]


def parse_args(argv=None):
    p = Parser("Build the embedded text-to-emoji world.")
    p.add_argument("--stage", default="all", choices=["all", *STAGES],
                   help="what to build; all: in this order, without what is finished. After a new "
                        "clip its eyes are due again, after a new vae its decoder")
    add_sources(p)
    p.add_argument("--out", default=None,
                   help="folder of the finished world; this program's own if left out")
    p.add_argument("--data", default=None,
                   help="folder of its prompt files; the repository's data/ for the program's own "
                        "world, else data/ in --out")
    p.add_argument("--work", default="out/tiny", help="folder of unfinished states and loss curves")
    args = p.parse_args(argv)
    args.out = args.out or os.path.relpath(HERE)
    if args.data is None:
        is_own = os.path.realpath(args.out) == os.path.realpath(HERE)
        args.data = os.path.relpath(os.path.join(ROOT, "data")) if is_own \
            else os.path.join(args.out, "data")
    return args


if __name__ == "__main__":
    ARGS = parse_args()

import copy
import hashlib
import io
import itertools
import json
import time
from importlib.metadata import version

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from matplotlib.figure import Figure
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
    ResNetConfig,
    ResNetForImageClassification,
)

from ddpo import velocity
from plumbing.checkpoints import load_checkpoint, save_checkpoint
from plumbing.devices import choose_device
from plumbing.files import make_folder, write
from tiny.drawings import (
    BACKGROUNDS,
    HAND_OF,
    HANDS,
    SIZES,
    Drawings,
    caption,
    random_captions,
)
from tiny.prompt_files import write_prompts
from tiny.task import write_task

STEPS = {                               # of each training
    "clip": 1600,
    "vae": 20000,
    "eyes": 6000,
    "judge": 2500,
    "unet": 22000,
    "decoder": 8000,
}
BATCH = {                               # pictures per step
    "clip": 128,
    "vae": 8,
    "eyes": 128,
    "judge": 128,
    "unet": 64,
    "decoder": 8,
}
FEW_STEPS = 5                           # a drawing's, of which half of the denoiser's timesteps are
PLACE = {name: i for i, name in enumerate(STEPS)}       # what makes their random numbers differ
PER_SCENE = 12                          # drawings of each scene that the denoiser learns from
MEAN, STD = .5, .25                     # what CLIP takes from a picture in 0..1, and divides by
TEXT_LENGTH = 24                        # tokens of a text, with start, end and padding


# ---- pictures ------------------------------------------------------------------------------------

def to_unit(pictures, device):
    """Pictures uint8 (N, 64, 64, 3) -> float (N, 3, 64, 64) in 0..1."""
    return torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 255


def augment(x, rng):
    """Pictures (B, 3, 64, 64) in 0..1 -> the same with noise, blur, tint.

    Such is what a half-trained or fine-tuned model may draw. CLIP and the judge are trained on
    these, so that they read it too.
    """
    B = len(x)

    def rand(channels):
        return torch.rand(B, channels, 1, 1, generator=rng).to(x.device)
    gray = x.mean(1, keepdim=True)
    x = gray + (x - gray) * (.6 + .6 * rand(1))                             # saturation
    x = x * (.75 + .4 * rand(3).lerp(rand(1), .7))                          # brightness, cast
    blurred = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    x = torch.where(rand(1) < .3, blurred, x)
    noise = torch.randn(x.shape, generator=rng).to(x.device)
    return (x + noise * .12 * rand(1) ** 2).clamp(0, 1)


def numpy_rng(rng):
    """A numpy generator that follows from a torch one."""
    return np.random.default_rng(int(torch.randint(2 ** 62, (1,), generator=rng)))


# ---- one training loop for every model -----------------------------------------------------------

def fit(name, model, loss_fn, lr, work, device, ema_decay=None):
    """AdamW with warm-up and a cosine; loss_fn(step, rng) -> loss, a scalar.

    Takes STEPS[name] steps, in bf16 where the machine multiplies in it. Returns the trained model
    or, with ema_decay, the average of its weights over the steps. Saves its state into the folder
    `name` in work, every minute and at the end, and resumes from there, bit for bit.
    """
    steps = STEPS[name]
    if steps < 3:
        raise UserError(f"{name}: {steps} steps are given; at least 3 are needed")
    folder = os.path.join(work, name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr,
                                  betas=(.9, .99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps,
                                                   pct_start=max(.05, 2 / steps))
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    average = None
    if ema_decay:
        average = copy.deepcopy(model).requires_grad_(False)
        parts["average"] = average
    _, dtype, _ = choose_device(device, "auto", learning=True)
    is_bf16 = dtype == "bf16"

    start, curve = 0, []
    state = load_checkpoint(folder, device)
    if state:
        begun_with = state["schedule"]["total_steps"]
        if begun_with != steps:
            raise UserError(f"{name}: {folder} was begun with {begun_with} steps, {steps} are "
                            "given; give another --work, or remove that folder")
        for key, part in parts.items():
            part.load_state_dict(state[key])
        start, curve = state["epoch"], state["curve"]

    saved = time.time()
    bar = tqdm(range(start, steps), desc=name, initial=start, total=steps, mininterval=10)
    for step in bar:
        rng = torch.Generator().manual_seed(1_000_003 * PLACE[name] + step)     # the step's own
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=is_bf16):
            loss = loss_fn(step, rng)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        schedule.step()
        if average:
            decay = min(ema_decay, (step + 1) / (step + 10))
            for mean, p in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(p.detach(), 1 - decay)
        if step % 20 == 0:
            curve.append([step, loss.item()])
            recent = [value for _, value in curve[-20:]]
            bar.set_postfix(loss=f"{sum(recent) / len(recent):.4f}")
        if time.time() - saved > 60 or step == steps - 1:
            state = {key: part.state_dict() for key, part in parts.items()}
            save_checkpoint(folder, {**state, "epoch": step + 1, "curve": curve})
            saved = time.time()
    save_curve(os.path.join(work, f"{name}.png"), curve, name)
    return (average or model).eval()


def save_curve(path, curve, title):
    """A training's losses, [[step, loss]], as a PNG."""
    steps, losses = zip(*curve, strict=True)
    figure = Figure(figsize=(6, 3))
    axis = figure.subplots()
    axis.semilogy(steps, losses, lw=.7)
    axis.set(title=title, xlabel="step", ylabel="loss")
    buffer = io.BytesIO()
    figure.savefig(buffer, bbox_inches="tight")
    write(path, buffer.getvalue(), "--work")


# ---- CLIP and its tokenizer ----------------------------------------------------------------------

def make_tokenizer(emoji, out):
    """CLIP's byte-pair tokenizer, with a vocabulary in which every word of the world is one token.

    Writes it into the folder out, and returns it.
    """
    texts = [caption(one.name, hand, size, background)
             for one in emoji for hand in HANDS for size in SIZES for background in BACKGROUNDS]
    words = {word for text in texts for word in text.split()} | {"a", "an"}
    endings = [word[-1] + "</w>" for word in sorted(words, key=longest_first)]
    # the order of the first tokens decides between merges that are equally frequent
    first = [*sorted(set("".join(words))), *dict.fromkeys(endings)]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=5000, end_of_word_suffix="</w>", special_tokens=first,
                                  show_progress=False)
    bpe.train_from_iterator([*texts, "an", "a"], trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())           # other text has tokens, too
    pieces = letters + [letter + "</w>" for letter in letters] + [a + b for a, b in merges]
    pieces = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TEXT_LENGTH)
    tokenizer.save_pretrained(out)
    return tokenizer


def longest_first(word):
    return -len(word), word


def tokenize(tokenizer, texts):
    """Texts -> token ids int64 (B, 24)."""
    return tokenizer(texts, padding="max_length", truncation=True, max_length=TEXT_LENGTH,
                     return_tensors="pt").input_ids


def train_clip(args, drawings, device):
    """A CLIPModel, contrastive; its text tower becomes the text encoder, as in SD 1.x."""
    torch.manual_seed(1)
    tokenizer = make_tokenizer(drawings.emoji, f"{args.out}/tokenizer")
    model = new_clip(tokenizer).to(device)
    loss_fn = clip_loss(model, tokenizer, drawings, device)
    model = fit("clip", model, loss_fn, 1e-3, args.work, device)
    text_encoder = CLIPTextModel(model.config.text_config)
    state = {key.removeprefix("text_model."): value for key, value in model.state_dict().items()
             if key.startswith("text_model.")}
    missing = text_encoder.load_state_dict(state, strict=False).missing_keys
    assert not [key for key in missing if "position_ids" not in key], missing
    text_encoder.half().save_pretrained(f"{args.out}/text_encoder")
    save_clip(model, tokenizer, f"{args.out}/clip")


def train_eyes(args, drawings, device):
    """More of CLIP's picture tower: every picture has to find its caption among all captions.

    The text tower stays, since the denoiser knows its states; only its projection learns.
    """
    model = CLIPModel.from_pretrained(f"{args.out}/clip").float().to(device).train()
    tokenizer = CLIPTokenizer.from_pretrained(f"{args.out}/clip")
    model.text_model.requires_grad_(False)
    captions = encode_captions(model, tokenizer, drawings.emoji, device)
    loss_fn = eyes_loss(model, captions, drawings, device)
    model = fit("eyes", model, loss_fn, 1e-3, args.work, device, ema_decay=.995)
    save_clip(model, tokenizer, f"{args.out}/clip")


@torch.no_grad()
def encode_captions(model, tokenizer, emoji, device):
    """The text tower's output for every caption: (emoji, 1 + sizes, 1 + backgrounds, 1 + hands, D).

    The first place of each is where it is left out.
    """
    choices = ([None, *SIZES], [None, *BACKGROUNDS], [None, *HANDS])
    texts = [caption(one.name, hand, size, background) for one in emoji
             for size, background, hand in itertools.product(*choices)]
    found = [model.text_model(tokenize(tokenizer, texts[k:k + 256]).to(device)).pooler_output
             for k in range(0, len(texts), 256)]
    return torch.cat(found).unflatten(0, (len(emoji), *map(len, choices)))


def eyes_loss(model, captions, drawings, device, spoiled=1 / 8):
    """Cross-entropy of each picture's own caption among all that say as much, and the reverse.

    The reverse: of the batch's pictures those that a caption is true of. spoiled: the share of
    pictures that are spoiled (spoil); no caption is true of them.
    """
    mean, std = normalisation(device)

    def loss_fn(step, rng):
        chance = numpy_rng(rng)
        scenes = drawings.random_scenes(BATCH["eyes"], chance)                      # (B, 4)
        pictures, is_spoiled = drawings.draw(scenes, chance), np.zeros(len(scenes), bool)
        for i in range(round(spoiled * len(scenes))):
            other = scenes[chance.integers(len(scenes))]
            pictures[i], is_spoiled[i] = spoil(drawings, pictures[i], scenes[i], other, chance)
        x = (augment(to_unit(pictures, device), rng) - mean) / std
        seen = model.visual_projection(model.vision_model(x).pooler_output)
        seen = F.normalize(seen.float(), dim=-1)                                    # (B, D)

        says = chance.random(3) < .5                    # size, background, hand: all captions alike
        facts = scenes[:, 1:].copy()
        facts[:, 2] = np.array(HAND_OF)[scenes[:, 3]]
        bank = captions[(slice(None), *(slice(1, None) if said else slice(1) for said in says))]
        place = np.ravel_multi_index((scenes[:, 0], *(facts * says).T), bank.shape[:-1])    # (B,)
        texts = model.text_projection(bank.flatten(0, -2))
        texts = F.normalize(texts.float(), dim=-1)                                  # (captions, D)
        logits = model.logit_scale.exp() * seen @ texts.T                           # (B, captions)
        place = torch.from_numpy(place).to(device)
        is_whole = torch.from_numpy(~is_spoiled).to(device)
        by_picture = F.cross_entropy(logits[is_whole], place[is_whole])
        own = logits[:, place[is_whole]].T                                          # (whole, B)
        is_true = ((place[is_whole][:, None] == place) & is_whole).float()
        return by_picture + F.cross_entropy(own, is_true / is_true.sum(1, keepdim=True))
    return loss_fn


def save_clip(model, tokenizer, out):
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    processor = CLIPImageProcessor(size={"shortest_edge": 64},
                                   crop_size={"height": 64, "width": 64},
                                   image_mean=[MEAN] * 3, image_std=[STD] * 3)
    processor.save_pretrained(out)


def new_clip(tokenizer):
    """A CLIPModel with random weights."""
    tower = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "projection_dim": 128,
    }
    text = {
        **tower,
        "num_hidden_layers": 3,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": TEXT_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }
    vision = {**tower, "num_hidden_layers": 4, "image_size": 64, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def normalisation(device):
    """The mean and the standard deviation of CLIP's pictures, in 0..1."""
    return tuple(torch.full((3, 1, 1), value, device=device) for value in (MEAN, STD))


def clip_loss(model, tokenizer, drawings, device):
    """CLIP's loss where several pictures can be right: its cross-entropies with soft targets.

    Half of a batch is random; the other half shows an eighth as many emoji, eight times each, so
    that hands, sizes and backgrounds have to be told apart.
    """
    mean, std = normalisation(device)
    combos, count = drawings.combos("train"), BATCH["clip"]

    def loss_fn(step, rng):
        chance = numpy_rng(rng)
        chosen = combos[chance.integers(len(combos), size=count)]           # (B, 3)
        few = chosen[:max(1, count // 16), 0]
        of_few = np.flatnonzero(np.isin(combos[:, 0], few))
        chosen[count // 2:] = combos[chance.choice(of_few, count - count // 2)]
        scenes, texts, says = random_captions(drawings.emoji, chosen, chance)
        x = (augment(to_unit(drawings.draw(scenes, chance), device), rng) - mean) / std
        ids = tokenize(tokenizer, texts).to(device)
        logits = model(input_ids=ids, pixel_values=x).logits_per_text.float()       # (B, B)
        is_true = torch.from_numpy(true_captions(scenes, says)).to(device).float()
        by_text = F.cross_entropy(logits, is_true / is_true.sum(1, keepdim=True))
        by_picture = F.cross_entropy(logits.T, is_true.T / is_true.T.sum(1, keepdim=True))
        return (by_text + by_picture) / 2
    return loss_fn


def true_captions(scenes, says):
    """Whether caption r is true of picture c, all that it says holding there: (B, B) bool.

    scenes (B, 4), and what each one's caption says (B, 3): its size, its background, its hand.
    """
    facts = np.column_stack([scenes[:, :3], np.array(HAND_OF)[scenes[:, 3]]])   # (B, 4)
    same = facts[:, None] == facts[None]                                        # (B, B, 4)
    return same[..., 0] & (same[..., 1:] | ~says[:, None]).all(-1)


def spoil(drawings, picture, scene, other, rng):
    """A picture as a model that lost its way may draw it: (the picture, whether it was spoiled).

    Of another hue, by 60 degrees or more; melted into another emoji; or washed out to eight
    pixels. A hue that hardly shows, of a white thing say, spoils nothing.
    """
    kind = rng.integers(3)
    if kind == 0:
        changed = drawings.draw_one(scene, rng, hue=rng.uniform(60, 300))
        plain = drawings.draw_one(scene, np.random.default_rng(0), hue=0.)
        shown = drawings.draw_one(scene, np.random.default_rng(0), hue=180.)
        is_coloured = np.abs(shown.astype(int) - plain).max(-1).mean() > 8
        return (changed, True) if is_coloured else (picture, False)
    if kind == 1 and other[0] != scene[0]:
        second = drawings.draw_one([other[0], *scene[1:]], rng)
        share = rng.uniform(.35, .65)
        return (picture * share + second * (1 - share)).astype(np.uint8), True
    small = picture.reshape(8, 8, 8, 8, 3).mean((1, 3))
    x = torch.from_numpy(small).permute(2, 0, 1)[None].float()
    x = F.interpolate(x, size=64, mode="bicubic")[0].permute(1, 2, 0)
    return x.clamp(0, 255).byte().numpy(), True


# ---- the judge -----------------------------------------------------------------------------------

def train_judge(args, drawings, device):
    """A small ResNet that names the emoji and the hand, as "peach, outlined".

    Another architecture, another seed and other drawings than CLIP's.
    """
    torch.manual_seed(2)
    names = [f"{one.name}, {hand}" for one in drawings.emoji for hand in HANDS]
    config = ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 128, 192], depths=[1, 1, 1, 1],
        layer_type="basic", id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)})
    model = ResNetForImageClassification(config).to(device)

    def loss_fn(step, rng):
        chance = numpy_rng(rng)
        scenes = drawings.random_scenes(BATCH["judge"], chance)
        labels = scenes[:, 0] * len(HANDS) + np.array(HAND_OF)[scenes[:, 3]]
        x = augment(to_unit(drawings.draw(scenes, chance), device), rng)
        logits = model(x * 2 - 1).logits                                    # (B, emoji x hands)
        return F.cross_entropy(logits.float(), torch.from_numpy(labels).to(device),
                               label_smoothing=.05)
    model = fit("judge", model.train(), loss_fn, 2e-3, args.work, device)
    model.half().save_pretrained(f"{args.out}/judge")


# ---- the autoencoder -----------------------------------------------------------------------------

def reconstruction_loss(error):
    """Of a picture's error (B, 3, 64, 64): its square, its size, and that of its edges."""
    error = error.float()
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()         # keeps it sharp
    return error.square().mean() + error.abs().mean() + .5 * edges


def random_pictures(drawings, count, rng, device):
    """Any scenes of the training combinations, by any drawer: (count, 3, 64, 64) in -1..1."""
    chance = numpy_rng(rng)
    scenes = drawings.random_scenes(count, chance)
    return to_unit(drawings.draw(scenes, chance), device) * 2 - 1


def train_vae(args, drawings, device):
    """diffusers' AutoencoderTiny: 64 x 64 x 3 <-> 8 x 8 x 16.

    Its plain convolutions, with nearly none of them at full resolution, got ten times further in an
    hour than AutoencoderKL did.
    """
    torch.manual_seed(3)
    model = AutoencoderTiny(
        encoder_block_out_channels=(48,) * 4, num_encoder_blocks=(0, 1, 1, 2),
        decoder_block_out_channels=(64,) * 4, num_decoder_blocks=(2, 2, 1, 0), latent_channels=16)
    model = model.to(device, memory_format=torch.channels_last)

    def loss_fn(step, rng):
        x = random_pictures(drawings, BATCH["vae"], rng, device)
        z = model.encode(x).latents.float()                                         # (B, 16, 8, 8)
        noise = torch.randn(z.shape, generator=rng).to(device) * z.std().detach()
        noisy = z + .05 * noise                         # the denoiser will not be exact
        return reconstruction_loss(model.decode(noisy).sample - x)
    model = fit("vae", model, loss_fn, 1e-3, args.work, device, ema_decay=.998)
    with torch.no_grad():
        x = random_pictures(drawings, 512, torch.Generator().manual_seed(0), device)
        z = torch.cat([model.encode(part).latents for part in x.split(64)])
    model.register_to_config(scaling_factor=round(1 / z.std().item(), 4))
    model.half().save_pretrained(f"{args.out}/vae")


def train_decoder(args, drawings, device):
    """More of the decoder alone: sharper pictures of the same latents, which the denoiser knows."""
    vae = AutoencoderTiny.from_pretrained(f"{args.out}/vae").float()
    vae = vae.to(device, memory_format=torch.channels_last)
    vae.encoder.requires_grad_(False)
    scaling = vae.config.scaling_factor

    def loss_fn(step, rng):
        x = random_pictures(drawings, BATCH["decoder"], rng, device)
        with torch.no_grad():
            z = vae.encode(x).latents.float() * scaling
        noisy = z + .1 * torch.randn(z.shape, generator=rng).to(device)     # of the latents' spread
        return reconstruction_loss(vae.decode(noisy / scaling).sample - x)
    vae = fit("decoder", vae, loss_fn, 1e-3, args.work, device, ema_decay=.998)
    vae.half().save_pretrained(f"{args.out}/vae")


# ---- the denoiser --------------------------------------------------------------------------------

def encode_world(args, drawings, vae, device):
    """Scaled latents of every training combination by every drawer, as a denoiser learns them.

    Float16 (N, 4, PER_SCENE, 16, 8, 8), N the training combinations; kept in --work.
    """
    combos = drawings.combos("train")
    weights = [p.detach().cpu().numpy().tobytes() for p in vae.encoder.parameters()]
    key = hashlib.sha256(b"".join([*weights, drawings.key.encode()])).hexdigest()[:8]
    cache = os.path.join(args.work, f"latents_{PER_SCENE}_{key}.npy")
    if not os.path.exists(cache):
        rng = np.random.default_rng(4)
        scenes = [(*combo, d) for combo in combos.tolist() for d in range(len(HAND_OF))
                  for _ in range(PER_SCENE)]
        latents = []
        for start in tqdm(range(0, len(scenes), 64), desc="encoding", mininterval=10):
            x = to_unit(drawings.draw(scenes[start:start + 64], rng), device) * 2 - 1
            with torch.no_grad():
                latents.append((vae.encode(x).latents * vae.config.scaling_factor).half().cpu())
        latents = torch.cat(latents).unflatten(0, (len(combos), len(HAND_OF), PER_SCENE))
        buffer = io.BytesIO()
        np.save(buffer, latents.numpy())
        write(cache, buffer.getvalue(), "--work")
    return torch.from_numpy(np.load(cache))


def train_unet(args, drawings, device):
    """The denoiser: 8 x 8 x 16 latents, conditioned on the text tower's states."""
    torch.manual_seed(4)
    vae = AutoencoderTiny.from_pretrained(f"{args.out}/vae").float().to(device)
    text_encoder = CLIPTextModel.from_pretrained(f"{args.out}/text_encoder").float().to(device)
    tokenizer = CLIPTokenizer.from_pretrained(f"{args.out}/tokenizer")
    alphas = make_scheduler(f"{args.out}/scheduler").alphas_cumprod.to(device)
    latents = encode_world(args, drawings, vae, device)
    model = UNet2DConditionModel(
        sample_size=8, in_channels=16, out_channels=16, block_out_channels=(128, 192),
        layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128, attention_head_dim=4)
    model.set_attn_processor(AttnProcessor())           # in bf16 on a CPU 1.4 times as fast a step
    model = model.to(device)

    def states_of(texts):
        with torch.no_grad():
            return text_encoder(tokenize(tokenizer, texts).to(device)).last_hidden_state
    loss_fn = unet_loss(model, drawings, latents, states_of, alphas, device)
    model = fit("unet", model, loss_fn, 1e-3, args.work, device, ema_decay=.999)
    model.half().save_pretrained(f"{args.out}/unet")


def make_scheduler(out):
    """The noise schedule, Stable Diffusion's, of a network that predicts the velocity.

    Drawing begins at the noisiest timestep (trailing, arXiv 2305.08891): five steps from 801 on
    would leave to the first noise, which no policy chooses, what is drawn.
    """
    scheduler = DDIMScheduler(
        beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction",
        timestep_spacing="trailing")
    scheduler.save_pretrained(out)
    return scheduler


def unet_loss(model, drawings, latents, states_of, alphas, device):
    """The denoising loss of v-prediction (arXiv 2202.00512); a tenth of the captions is blank.

    Half of the timesteps are those of a drawing in FEW_STEPS, the others any of 1000.
    """
    combos = drawings.combos("train")

    def loss_fn(step, rng):
        chance = numpy_rng(rng)
        i = chance.integers(len(combos), size=BATCH["unet"])                        # (B,)
        scenes, texts, _ = random_captions(drawings.emoji, combos[i], chance)
        is_blank = chance.random(len(i)) < .1
        texts = ["" if blank else text for blank, text in zip(is_blank, texts, strict=True)]
        x0 = latents[i, scenes[:, 3], chance.integers(PER_SCENE, size=len(i))]      # (B, 16, 8, 8)
        noise = torch.randn(x0.shape, generator=rng).to(device)
        x0 = x0.float().to(device)
        t = torch.randint(1000, (len(i),), generator=rng)
        is_few = torch.rand(len(i), generator=rng) < .5
        spacing = 1000 // FEW_STEPS
        t = torch.where(is_few, t // spacing * spacing + 1, t).to(device)
        a = alphas[t].view(-1, 1, 1, 1)
        x = a.sqrt() * x0 + (1 - a).sqrt() * noise
        output = model(x, t, states_of(texts)).sample
        return (output.float() - velocity(x0, noise, a)).square().mean()
    return loss_fn


# ---- what the folder says of itself --------------------------------------------------------------

def write_index(out):
    """model_index.json, so that stock diffusers loads the folder."""
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": version("diffusers"),
        "requires_safety_checker": False,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderTiny"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    write(os.path.join(out, "model_index.json"), json.dumps(index, indent=2), "--out")


def write_attribution(out):
    """ATTRIBUTION: who made what, under which licence."""
    write(os.path.join(out, "ATTRIBUTION"), """\
The models in this folder were trained from random weights, by build.py, on pictures made from the
emoji of three projects, by way of their npm packages:

Noto Emoji (@iconify-json/noto), Copyright Google LLC, Apache License 2.0,
https://github.com/googlefonts/noto-emoji

Twemoji (@iconify-json/twemoji), Copyright Twitter, Inc. and other contributors, CC-BY-4.0,
https://github.com/jdecked/twemoji

Fluent Emoji Flat (@iconify-json/fluent-emoji-flat), Copyright Microsoft Corporation, MIT License,
https://github.com/microsoft/fluentui-emoji

What was changed: the drawings were rasterised, cropped, resized, turned by a few degrees, slightly
tinted and set on plain backgrounds; Fluent's were used a second time with a dark outline. The
weights are given under CC-BY-4.0 (https://creativecommons.org/licenses/by/4.0/).
""", "--out")


# ---- the command ---------------------------------------------------------------------------------

NEEDS = {                               # what earlier stages make
    "eyes": ["clip"],
    "unet": ["vae", "text_encoder", "tokenizer"],
    "decoder": ["vae"],
    "data": ["unet", "vae", "text_encoder"],
}


def main(args):
    drawings = Drawings(args.icons, args.emoji)         # complain before an hour of training
    for part in NEEDS.get(args.stage, []):
        if not os.path.isdir(os.path.join(args.out, part)):
            raise UserError(f"--stage: {args.stage} needs {args.out}/{part}, "
                            "which an earlier stage makes")
    make_folder(args.work, "--work")
    make_folder(args.out, "--out")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stages = {
        "clip": train_clip,
        "vae": train_vae,
        "eyes": train_eyes,
        "judge": train_judge,
        "unet": train_unet,
        "decoder": train_decoder,
        "task": write_task,
        "data": write_prompts,
    }
    write_index(args.out)
    write_attribution(args.out)
    for name, stage in stages.items():
        if args.stage in ("all", name):
            stage(args, drawings, device)


if __name__ == "__main__":
    run(main, ARGS)
