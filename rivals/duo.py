"""DUO (Park et al., NeurIPS 2024, arXiv 2407.21035): prefer an unsafe picture's safe twin.

Diffusion-DPO on pairs of pictures without any text, so that no prompt, attacked or not, leads back.
An unsafe picture is the base's own; its twin is drawn from it by SDEdit (arXiv 2108.01073), towards
safe text and away from the prompt, anew until no unsafe label fires. A pair shares its noise, not
its timesteps. A second term keeps the network's answer to pure noise, and with it all that is
decided first.

Ours: the safe text is rivals.guiding.safe_states'; a pair that stays unsafe after TRIES twins is
dropped (theirs tries on); a network that puts out v is compared with each picture's own v (theirs:
both with the unsafe one's), and on pure noise held by what that makes of epsilon; latents are the
encoder's mode (theirs: drawn), and AdamW has no weight decay (theirs 1e-2). The pictures that count
as unsafe are those of --unsafe-labels, five labels; theirs are four, without buttocks.

Letters: z latents (B, C, h, w) of pictures, x noised ones; e the noise.
"""
import numpy as np
import torch
import torch.nn.functional as F

from ddpo import denoise, draw_noise, mean_distance
from model import guided
from plumbing.options import UserError
from prompts import cycle_prompts
from reward import THRESHOLD, Nudity, worst_label
from rivals import Edit
from rivals.editing import noised, to_latents, using_weights
from rivals.guiding import check_safe_text, safe_states

TRIES = 20                              # twins drawn of a picture until one is safe
LAST = .75                              # the pairs' timesteps are of the first three quarters


def duo_loss(safe, unsafe, beta):
    """-log sigmoid(-beta (safe - unsafe)), (B,) each, averaged.

    safe, unsafe: by how much the network's squared error on a picture is above the base's.
    """
    return -F.logsigmoid(-beta * (safe - unsafe)).mean()


def step(job, prompts, rng):
    """Random pairs at random timesteps; prompts are not looked at.

    At the first step it is log 2: the network is still the base.
    """
    policy, args = job.policy, job.args
    safe, unsafe = job.data
    B = args.batch_size
    i = rng.integers(len(safe), size=B)
    seeds = rng.integers(2 ** 62, size=B)
    times = len(policy.scheduler.alphas_cumprod)
    t = rng.integers(int(LAST * times), size=2 * B)
    t = torch.from_numpy(np.append(t, np.full(B, times - 1))).to(policy.device)         # (3B,)
    noise = draw_noise(seeds, 0, safe.shape[1:])[:, 0].to(policy.device)
    z, e = torch.cat([safe[i], unsafe[i]]), torch.cat([noise, noise])           # (2B, C, h, w)
    x, target = noised(policy, z, e, t[:2 * B])
    x = torch.cat([x, noise])                                                   # (3B, C, h, w)
    empty = policy.encode([""] * len(x))
    with using_weights(job.trained, job.start):
        base = policy.unet_output(x, t, empty)
    output = policy.unet_output(x, t, empty)
    above = mean_distance(output[:2 * B], target) - mean_distance(base[:2 * B], target)
    prior = ((output[2 * B:] - base[2 * B:]) ** 2).mean()
    if policy.prediction_type == "v_prediction":        # of epsilon: it differs by sqrt(a) v's
        prior = policy.scheduler.alphas_cumprod[-1].item() * prior
    return duo_loss(*above.chunk(2), args.beta) + args.prior_weight * args.beta * prior


# ---- the pairs -----------------------------------------------------------------------------------

def prepare(job, prompts, benign, labels):
    """Make job.data, latents (safe, unsafe) of the base's pictures; no extra tensors."""
    args, policy = job.args, job.policy
    check_safe_text(policy, prompts)
    nudity = Nudity(device=policy.device)

    def trips(shown):
        return worst_label(nudity(shown), labels) >= THRESHOLD
    picked, seeds = cycle_prompts(prompts, args.pictures, args.seed)
    pictures = job.draw(picked, seeds)                                          # (N, H, W, 3)
    found = np.flatnonzero(trips(pictures))
    if not len(found):
        raise UserError(f"--pictures: none of {args.pictures} pictures of --prompts trips the "
                        "detector; duo needs some that do")
    unsafe = to_latents(policy, pictures[found])
    safe, left = torch.zeros_like(unsafe), np.arange(len(found))
    for attempt in range(TRIES):
        rng = np.random.default_rng([args.seed, attempt])
        still_unsafe = []
        for start in range(0, len(left), args.batch_size):
            rows = left[start:start + args.batch_size]
            twins = twin(job, unsafe[rows], [picked[found[row]] for row in rows], rng)
            is_unsafe = trips(policy.decode(twins).cpu().numpy())
            safe[rows[~is_unsafe]] = twins[torch.from_numpy(~is_unsafe)]
            still_unsafe.append(rows[is_unsafe])
        left = np.concatenate(still_unsafe)
        if not len(left):
            break
    kept = np.setdiff1d(np.arange(len(found)), left)
    if not len(kept):
        raise UserError(f"--strength: no picture became safe in {TRIES} tries; give more")
    print(f"pairs          {len(kept)} of {args.pictures} pictures; {len(left)} unsafe ones had no "
          f"safe twin in {TRIES} tries", flush=True)
    job.data = safe[kept], unsafe[kept]


@torch.no_grad()
def twin(job, z, prompts, rng):
    """Pictures' latents z (B, C, h, w), noised by --strength and drawn again as safe ones."""
    policy, args, schedule = job.policy, job.args, job.schedule
    steps = len(schedule.t)
    start = steps - max(1, int(args.strength * steps))
    noise = draw_noise(rng.integers(2 ** 62, size=len(z)), steps - start, z.shape[1:])
    noise = noise.to(policy.device)
    a = schedule.a_t[start]
    noise[:, 0] = a.sqrt() * z + (1 - a).sqrt() * noise[:, 0]
    predict = guided(policy, safe_states(policy, prompts), policy.encode(prompts),
                     args.start_guidance)
    return denoise(predict, noise, schedule, policy.prediction_type, start)


DUO = Edit(
    step, "DUO, arXiv 2407.21035", weights=r".*attn1", prepare=prepare,
    uses=("pictures", "unsafe_labels", "start_guidance", "strength", "beta", "prior_weight"),
    max_grad_norm=1., settings={
        "embedded": {                   # not tuned yet
            "trainable": "lora",
            "rank": 32,
            "iterations": 300,
            "lr": 1e-3,
            "batch_size": 16,
            "pictures": 128,
            "strength": .75,
            "start_guidance": 3.,
            "beta": 31.,                # the authors' 500 for as many latent elements as are here
            "prior_weight": 1e4,
        },
        "stable_diffusion": {           # the authors'; of 100 pictures some 64 are unsafe
            "trainable": "lora",
            "rank": 32,
            "iterations": 1000,
            "lr": 6e-5,
            "batch_size": 1,
            "pictures": 100,
            "strength": .75,
            "start_guidance": 7.5,
            "beta": 500.,
            "prior_weight": 1e4,
        },
    })
