"""PNO, prompt-noise optimisation (Peng et al., arXiv 2412.03876): search for a safe picture.

Up to NOISES fresh noises are tried; where none is found safe by a differentiable judge, the best
one and the text states of both halves of guidance are moved by gradient, through all sampling
steps, for up to UPDATES updates; the best picture seen is returned. Sampling is DDIM's with eta 0,
whatever --eta. A penalty keeps the noise Gaussian in the mean and the covariance of its cut into
vectors of K (arXiv 2405.18881).

Ours: the judge is CLIP, asked to tell the unsafe from the safe texts of the model's concept_pairs
(without such a file: the concept's words from "something harmless"), where the authors ask Q16,
CLIP with two learned prompts. It is CLIP's own opinion: the detector that counts is not seen. The
authors' code makes 5 updates, the paper 25.

Letters: z a noise as n vectors of K; p the judge's probability of unsafe.
"""
import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ddpo import denoise, step_mean
from model import guided
from plumbing.pairs import read_pairs
from reward import ClipScore
from rivals.guiding import concept_words

NOISES, UPDATES, LR = 5, 5, .07
ENOUGH = 2.5                            # of a score of 5 - 5 p: p below a half
K, PERMUTATIONS = 4, 100


def pno(policy, prompts, noise, schedule, scale, start=0, updates=UPDATES, lr=LR):
    """A sampler. The fresh noises are those that eta 0 leaves unused in `noise`."""
    schedule = policy.schedule(len(schedule.t), eta=0.)
    judge = judge_of(policy)
    text = policy.encode(prompts)
    away = policy.encode([""]).expand_as(text)

    def draw(x, text, away, scale):
        predict = guided(policy, text, away, scale)
        still = torch.zeros_like(x)[:, None].expand(-1, len(schedule.t) + 1, -1, -1, -1)
        return denoise(predict, torch.cat([x[:, None], still[:, 1:]], 1), schedule,
                       policy.prediction_type, start)
    best, score, x = None, None, noise[:, 0].clone()
    for fresh in noise[:, :1 if start else NOISES].unbind(1):
        if best is not None and (score > ENOUGH).all():
            break
        latents = draw(fresh, text, away, scale)
        with torch.no_grad():
            found = 5 - 5 * judge(latents)
        if best is None:
            best, score = latents, found
        else:                                           # a picture that is safe is not drawn anew
            better = (found > score) & (score <= ENOUGH)
            best[better], score[better], x[better] = latents[better], found[better], fresh[better]
    left = (score <= ENOUGH).nonzero()[:, 0]
    if len(left):
        own = scale[left.cpu()] if torch.is_tensor(scale) else scale
        moved = optimise(policy, judge, x[left], text[left], away[left], schedule, own, start,
                         best[left], score[left], updates, lr)
        best[left] = moved
    return best


def optimise(policy, judge, x, text, away, schedule, scale, start, best, score, updates, lr):
    """Move noises x and text states; the best latents seen, from `best` with its `score` on."""
    x, text, away = (tensor.detach().clone().float().requires_grad_()
                     for tensor in (x, text, away))
    optimizer = torch.optim.AdamW([x, text, away], lr=lr)
    for update in range(int(updates) + 1):
        latents = draw_with_gradient(policy, x, text, away, schedule, scale, start)
        p = judge(latents)
        found = (5 - 5 * p).detach()
        better = found > score
        best, score = best.clone(), score.clone()
        best[better], score[better] = latents.detach()[better], found[better]
        unsafe = score <= ENOUGH
        if update == int(updates) or not unsafe.any():
            return best
        generator = torch.Generator().manual_seed(update)
        penalty = torch.stack([unlikeliness(one, generator) for one in x])
        loss = (5 * p - 5 + penalty)[unsafe].sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def draw_with_gradient(policy, x, text, away, schedule, scale, start):
    """DDIM with eta 0, each step's network called again in the backward pass."""
    predict = guided(policy, text, away, scale)
    for k in range(start, len(schedule.t)):
        x, _ = checkpoint(step_mean, predict, x, schedule, k, policy.prediction_type,
                          use_reentrant=False)
    return x


# ---- the penalty ---------------------------------------------------------------------------------

def unlikeliness(noise, generator=None):
    """-(log p1 + log p2) of a noise (any shape), and of its elements in PERMUTATIONS other orders.

    Constant, without a gradient, while the noise is a typical one. The penalty of all orders but
    the first is averaged.
    """
    flat = noise.flatten()
    orders = torch.stack([torch.randperm(len(flat), generator=generator)
                          for _ in range(PERMUTATIONS)]).to(flat.device)
    first = log_typical(flat.view(1, -1, K))
    others = log_typical(flat[orders].view(PERMUTATIONS, -1, K))
    return -(first.sum() + others.mean())


def log_typical(z):
    """log p1 + log p2, (N,), of noises z (N, n, K), each cut into n vectors.

    M1 = |mean z|, log p1 = min(-log 2, -n M1^2 / 2K); M2 = |z'z / n - 1| (spectral),
    log p2 = min(-log 2, -n max(sqrt(1 + M2) - 1 - sqrt(K / n), 0)^2 / 2).
    """
    n, k = z.shape[1:]
    m1 = z.mean(1).square().sum(1)                                              # squared
    log_p1 = -n * m1 / (2 * k)
    covariance = z.transpose(1, 2) @ z / n - torch.eye(k, device=z.device)
    m2 = torch.linalg.matrix_norm(covariance, ord=2)
    log_p2 = -n * (torch.sqrt(1 + m2) - 1 - math.sqrt(k / n)).clamp(min=0) ** 2 / 2
    return log_p1.clamp(max=-math.log(2)) + log_p2.clamp(max=-math.log(2))


# ---- the judge -----------------------------------------------------------------------------------

def judge_of(policy):
    """latents (B, C, h, w) -> CLIP's probability that their pictures are unsafe, (B,)."""
    world = policy.world
    clip, unsafe, safe = clip_judge(world.clip, world.clip_option, world.concept_pairs,
                                    policy.concept, policy.device)

    def judge(latents):
        decoded = policy.vae.decode(latents / policy.vae.config.scaling_factor).sample
        pictures = (decoded / 2 + .5).clamp(0, 1)                               # (B, 3, H, W)
        found = clip.embed_scaled(F.interpolate(pictures, size=(clip.size, clip.size),
                                                mode="bicubic", antialias=True))
        scale = clip.model.logit_scale.exp()
        logits = [(scale * found @ texts.T).logsumexp(1) - math.log(len(texts))
                  for texts in (unsafe, safe)]                                  # (B,) each
        return torch.sigmoid(logits[0] - logits[1])
    return judge


@lru_cache(maxsize=1)
def clip_judge(name, option, pairs, concept, device):
    """(ClipScore, unit embeddings of the unsafe texts and of the safe ones)."""
    unsafe = [f"a picture of {word}" for word in concept_words(concept)]
    safe = ["a picture of something harmless"]
    if pairs:
        unsafe, safe = zip(*read_pairs(pairs), strict=True)
    clip = ClipScore(name, device, option)
    clip.model.requires_grad_(False)
    return clip, clip.embed_texts(unsafe), clip.embed_texts(safe)
