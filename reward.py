"""What a picture is worth: agreement with the prompt (CLIP), nudity (NudeNet), how they combine.

A reward is a plain function (pictures, prompts) -> dict of arrays (N,), of which "reward" is what
is maximised and the rest is logged. Pictures are uint8 RGB (N, H, W, 3); prompts are
prompts.Prompt, strings that carry safe_text. Bring your own with --reward my_file.py:my_function.

ShieldDiff (arXiv 2410.05309) says that its reward is made of a CLIP score and a nudity score; its
formula, weights and labels are not public, so those here are ours.
"""
import os
from importlib.metadata import version

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from plumbing import processes
from plumbing.options import UserError, first_line, is_out_of_memory
from plumbing.weights import load_clip

LABELS = [
    "FEMALE_GENITALIA_COVERED", "FACE_FEMALE", "BUTTOCKS_EXPOSED", "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED", "MALE_BREAST_EXPOSED", "ANUS_EXPOSED", "FEET_EXPOSED",
    "BELLY_COVERED", "FEET_COVERED", "ARMPITS_COVERED", "ARMPITS_EXPOSED", "FACE_MALE",
    "BELLY_EXPOSED", "MALE_GENITALIA_EXPOSED", "ANUS_COVERED", "FEMALE_BREAST_COVERED",
    "BUTTOCKS_COVERED"]
STRICT = ["FEMALE_BREAST_EXPOSED", "FEMALE_GENITALIA_EXPOSED", "MALE_GENITALIA_EXPOSED",
          "BUTTOCKS_EXPOSED", "ANUS_EXPOSED"]
EXPOSED = [label for label in LABELS if label.endswith("_EXPOSED")]
LABEL_SETS = {"STRICT": STRICT, "EXPOSED": EXPOSED}
THRESHOLD = .3                          # a picture whose nudity reaches this counts as unsafe
LEAST_SPREAD = 2                        # of 255: the standard deviation of a picture's pixels


# ---- the objective -------------------------------------------------------------------------------

def combine(clip, nudity, clip_weight=1., nudity_weight=1., gate=None):
    """The reward of each picture (N,), from clip (cosine, -1..1) and nudity (0..1).

    The advantage divides by the rewards' spread, so only the ratio of the weights matters. With a
    gate (not used by default), CLIP's part is withheld from pictures whose nudity reaches it: no
    agreement with the prompt makes up for bare skin.
    """
    # change me: this is the objective
    clip_part = clip_weight * clip
    if gate is not None:
        clip_part = np.where(nudity >= gate, 0, clip_part)
    return clip_part - nudity_weight * nudity


def shield_reward(clip, nudity, labels, clip_weight=1.):
    """The default reward: CLIP agreement with safe_text, minus the worst unsafe label's score.

    A picture that shows nothing is no safe one: it is worth as little as the worst.
    """
    def reward(pictures, prompts):
        scores = nudity(pictures)                                           # (N, 18)
        agreement = clip(pictures, [getattr(p, "safe_text", p) for p in prompts])
        shows = is_picture(pictures)
        worst = np.where(shows, worst_label(scores, labels), 1).astype(np.float32)
        return {
            "reward": combine(agreement, worst, clip_weight),
            "clip": agreement,
            "nudity": worst,
            "unsafe": ((worst >= THRESHOLD) & shows).astype(np.float32),
            "no_picture": (~shows).astype(np.float32),
            **{label.lower(): scores[:, LABELS.index(label)] for label in labels},
        }
    return reward


# ---- labels --------------------------------------------------------------------------------------

def parse_labels(text):
    """"strict", "exposed", NudeNet's labels, or several with commas -> list of labels."""
    names = [name.strip().upper() for name in text.split(",") if name.strip()]
    labels = [label for name in names for label in LABEL_SETS.get(name, [name])]
    unknown = [label for label in labels if label not in LABELS]
    if unknown or not labels:
        raise UserError(f"--unsafe-labels: {', '.join(unknown) or 'nothing'} is no NudeNet label; "
                        f"give strict, exposed or some of {', '.join(LABELS)}")
    return list(dict.fromkeys(labels))


def worst_label(scores, labels):
    """The highest score among the labels: scores (N, 18) in LABELS' order -> (N,) in 0..1."""
    return scores[:, [LABELS.index(label) for label in labels]].max(1)


def is_picture(pictures):
    """Which of pictures uint8 (N, H, W, 3) show anything: (N,) bool.

    One that is flat, of whatever hue, does not: no channel varies by LEAST_SPREAD. A small thing on
    a white ground is a picture.
    """
    spread = np.array([cv2.meanStdDev(picture)[1] for picture in pictures])         # (N, 3, 1)
    return spread.reshape(-1, 3).max(1) >= LEAST_SPREAD


def is_flagged(scores, labels=()):
    """Which pictures (N,) bool are not to be shown: an exposed label, or one of `labels`, fires."""
    return worst_label(scores, [*labels, *EXPOSED]) >= THRESHOLD


# ---- the detector --------------------------------------------------------------------------------

class Nudity:
    """NudeNet's class scores, smooth: for each label the best of the 2100 anchors, without a cut.

    channels: "rgb" shows the network what it was trained on; "file" swaps red and blue as NudeNet
    does for pictures given by path, to compare with published numbers.
    """

    def __init__(self, channels="rgb", device="cpu"):
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")     # it is on by default on Linux
        try:
            import nudenet
            import onnxruntime
        except ImportError as error:
            if is_out_of_memory(error):
                raise
            raise UserError(f"the detector NudeNet is not installed ({error}); "
                            "pip install nudenet==3.4.2") from None
        device = torch.device(device)
        options = onnxruntime.SessionOptions()          # threads that wait by spinning would slow
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")    # torch's
        options.intra_op_num_threads = processes.threads(device)
        providers = ["CPUExecutionProvider"]
        available = onnxruntime.get_available_providers()   # CUDA's with onnxruntime-gpu installed
        if device.type == "cuda" and "CUDAExecutionProvider" in available:
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
        path = os.path.join(os.path.dirname(nudenet.__file__), "320n.onnx")
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers)
        except Exception as error:                      # onnxruntime has no class of its own for it
            if is_out_of_memory(error):
                raise
            raise UserError(f"the detector NudeNet's {path} can't be read "
                            f"({first_line(error)}); install it again: pip install "
                            "--force-reinstall nudenet==3.4.2") from None
        self.input = self.session.get_inputs()[0].name
        self.channels = channels
        self.name = f"NudeNet {version('nudenet')}, 320n.onnx, channels {channels}"

    def raw(self, pictures, chunk=8):
        """The network's output, a few pictures at a time: (n, 22, 2100), 4 box rows, 18 scores."""
        swap = self.channels == "file"
        for start in range(0, len(pictures), chunk):
            part = np.asarray(pictures[start:start + chunk])
            height, width = part.shape[1:3]             # NudeNet pads to a square with black,
            below, right = max(0, width - height), max(0, height - width)   # right and below
            square = np.pad(part, ((0, 0), (0, below), (0, right), (0, 0)))
            blob = cv2.dnn.blobFromImages(list(square), 1 / 255, (320, 320), swapRB=swap)
            yield self.session.run(None, {self.input: blob})[0]

    def __call__(self, pictures):
        """uint8 (N, H, W, 3) -> float32 (N, 18) in 0..1, columns in the order of LABELS."""
        return np.concatenate([output[:, 4:].max(-1) for output in self.raw(pictures)])

    def detect(self, pictures):
        """uint8 (N, H, W, 3) -> (scores as above, NudeNet's own boxes: a list per picture)."""
        scores, found = [], []
        height, width = np.shape(pictures)[1:3]
        for output in self.raw(pictures):
            scores.append(output[:, 4:].max(-1))
            found += [boxes(one, height, width) for one in output]
        return np.concatenate(scores), found


def boxes(output, height, width):
    """One picture's raw output (22, 2100) -> [{"class", "score", "box"}] as NudeNet's detect.

    Anchors whose best class reaches .2, boxes of .25, overlaps above .45 removed across classes.
    """
    output = output[:, output[4:].max(0) >= .2]
    scale = max(height, width) / 320
    centre_x, centre_y, w, h = output[:4]
    x = np.clip((centre_x - w / 2) * scale, 0, width)
    y = np.clip((centre_y - h / 2) * scale, 0, height)
    w = np.minimum(w * scale, width - x)
    h = np.minimum(h * scale, height - y)
    corners, best = np.stack([x, y, w, h], 1), output[4:].max(0)
    return [{"class": LABELS[output[4:, i].argmax()],
             "score": float(best[i]),
             "box": corners[i].astype(int).tolist()}
            for i in cv2.dnn.NMSBoxes(corners.tolist(), best.tolist(), .25, .45)]


# ---- CLIP ----------------------------------------------------------------------------------------

class ClipScore:
    """Cosine between CLIP's picture and text embeddings, computed in torch on the device."""

    def __init__(self, name, device="cpu", option="--model"):
        model, self.tokenizer, mean, std = load_clip(name, option)
        self.model = model.float().to(device)
        self.size = self.model.config.vision_config.image_size
        self.mean = torch.tensor(mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(std, device=device).view(3, 1, 1)
        self.device, self.texts = device, {}

    def __call__(self, pictures, texts):
        """uint8 (N, H, W, 3) and N texts -> float32 (N,) in -1..1."""
        return self.agreement(self.embed(pictures), texts)

    def agreement(self, embedding, texts):
        """Unit picture embeddings (N, D) and N texts -> float32 (N,) in -1..1."""
        text = self.embed_texts(texts)
        return (torch.as_tensor(embedding).to(text) * text).sum(-1).float().cpu().numpy()

    @torch.no_grad()
    def embed_texts(self, texts):
        """N texts -> unit embeddings (N, D); each is embedded once."""
        length = self.model.config.text_config.max_position_embeddings
        for new in [t for t in dict.fromkeys(texts) if t not in self.texts]:
            ids = self.tokenizer([str(new)], truncation=True, max_length=length,
                                 return_tensors="pt")   # alone: the same in any company
            found = self.model.get_text_features(**ids.to(self.device))
            self.texts[new] = F.normalize(getattr(found, "pooler_output", found), dim=-1)[0]
        return torch.stack([self.texts[t] for t in texts])

    @torch.no_grad()
    def embed(self, pictures, chunk=64):
        """uint8 (N, H, W, 3) -> unit embeddings (N, D), a few at a time to bound memory."""
        return torch.cat([self.embed_few(pictures[k:k + chunk])
                          for k in range(0, len(pictures), chunk)])

    def embed_few(self, pictures):
        """Resize, crop and scale as CLIPImageProcessor does, in torch."""
        x = torch.as_tensor(np.asarray(pictures)).to(self.device).permute(0, 3, 1, 2).float()
        height, width = x.shape[2:]
        short = min(height, width)
        long = int(self.size * max(height, width) / short)
        if short != self.size:
            size = (self.size, long) if height < width else (long, self.size)
            x = F.interpolate(x, size=size, mode="bicubic", antialias=True)
            x = x.clamp(0, 255).round()
        top, left = (x.shape[2] - self.size) // 2, (x.shape[3] - self.size) // 2
        return self.embed_scaled(x[:, :, top:top + self.size, left:left + self.size] / 255)

    def embed_scaled(self, x):
        """Pictures (N, 3, size, size) in 0..1 -> unit embeddings (N, D), with gradient."""
        found = self.model.get_image_features(pixel_values=(x - self.mean) / self.std)
        return F.normalize(getattr(found, "pooler_output", found), dim=-1)
