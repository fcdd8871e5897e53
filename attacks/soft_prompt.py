"""A soft prompt, in the manner of UnlearnDiffAtk (Zhang et al., ECCV 2024, arXiv 2310.11868).

Free token embeddings before each prompt's own, fitted to make the defended UNet predict the noise
in the base model's unsafe pictures. Ours, for UnlearnDiffAtk walks a simplex of tokens: an upper
bound of what prompts can revive.

Letters: n prompts with K soft tokens each; text states (L, D); x0 a picture's latents.
"""
import torch
from tqdm import tqdm

import rivals
from attacks import Adversarial, Attack
from attacks.tokens import draw_integers, draw_normal, generators, legal_tokens
from ddpo import velocity
from model import Policy
from plumbing.devices import DTYPES, choose_device
from plumbing.names import parse_checkpoint
from reward import THRESHOLD, Nudity, parse_labels, worst_label
from sample import choose_method, draw_latents


def soft_prompt(policy, prompts, args):
    """min E || e_theta(x_t, t, E([soft; prompt])) - e ||^2, equation 6 there, on embeddings.

    theta is --checkpoint's UNet, whatever method it is drawn with; it computes in bf16 where
    learning does. Each prompt has its picture, the base's most nude of --tries seeds.
    """
    parts = parse_checkpoint(args.checkpoint, rivals.is_method).parts
    _, dtype, _ = choose_device(args.device, args.dtype, learning=True)
    defended = Policy(args.model, parts, policy.device, DTYPES[dtype])
    latents = unsafe_latents(policy, prompts, args)                             # (N, C, h, w)
    rngs = generators(len(prompts), args.seed)
    starts = range(0, len(prompts), args.batch_size)
    states, losses = [], []
    with tqdm(total=len(starts) * args.iterations, desc="soft prompt") as bar:
        def tick(loss):
            losses.append(loss)
            bar.set_postfix(loss=f"{loss:.4f}")
            bar.update()
        for start in starts:
            part = slice(start, start + args.batch_size)
            states.append(fit(policy, defended, prompts[part], latents[part], rngs[part], args,
                              tick))
    losses = torch.tensor(losses).view(len(starts), -1)
    tenth = max(1, args.iterations // 10)
    print(f"loss of the first tenth of the iterations {losses[:, :tenth].mean():.4f}, "
          f"of the last {losses[:, -tenth:].mean():.4f}")
    return [Adversarial(str(prompt), prompt, own)
            for prompt, own in zip(prompts, torch.cat(states), strict=True)]


def unsafe_latents(policy, prompts, args):
    """The base's own picture of each prompt that is the most nude of --tries: (N, C, h, w)."""
    labels, nudity = parse_labels(args.unsafe_labels), Nudity(device=policy.device)
    schedule, sampler = policy.schedule(args.steps, args.eta), choose_method("plain").sampler
    best = worst = None
    for turn in range(args.tries):
        first = 3_000_000 + args.seed + turn * 1_000_000
        seeds = [first + i for i in range(len(prompts))]
        latents = draw_latents(policy, sampler, prompts, seeds, schedule, args.guidance,
                               args.batch_size, args.resolution)
        scores = worst_label(nudity(policy.decode(latents).cpu().numpy()), labels)
        scores = torch.from_numpy(scores).to(policy.device)                     # (N,)
        if best is None:
            best, worst = latents, scores
        else:
            best = torch.where((scores > worst).view(-1, 1, 1, 1), latents, best)
            worst = torch.maximum(scores, worst)
    print(f"the base's pictures: {(worst >= THRESHOLD).sum()} of {len(prompts)} trip the detector")
    return best


def fit(policy, defended, prompts, x0, rngs, args, tick):
    """Text states (n, L, D) of the prompts with the soft tokens that suit their latents x0."""
    schedule = policy.schedule(args.steps, args.eta)
    legal = torch.tensor(legal_tokens(policy.tokenizer))
    first = legal[draw_integers(rngs, len(legal), args.tokens)].to(policy.device)       # (n, K)
    embeddings = policy.text_encoder.get_input_embeddings()
    soft = embeddings.weight[first].detach().clone().requires_grad_()                   # (n, K, D)
    encode = soft_encoder(policy, prompts, soft)
    optimizer = torch.optim.Adam([soft], lr=args.lr)
    for _ in range(args.iterations):
        k = draw_integers(rngs, len(schedule.t), 1)[:, 0].to(policy.device)             # (n,)
        eps = draw_normal(rngs, *x0.shape[1:]).to(policy.device)
        a = schedule.a_t[k].view(-1, 1, 1, 1)
        x = a.sqrt() * x0 + (1 - a).sqrt() * eps
        target = eps if policy.prediction_type == "epsilon" else velocity(x0, eps, a)
        error = (defended.unet_output(x, schedule.t[k], encode()) - target) ** 2
        loss = error.flatten(1).mean(1)                                                 # (n,)
        loss.sum().backward()                           # no prompt's step depends on another's
        optimizer.step()
        optimizer.zero_grad()
        tick(loss.mean().item())
    with torch.no_grad():
        return encode().float()


def soft_encoder(policy, prompts, soft):
    """A function () -> text states (n, L, D) of the prompts behind soft embeddings (n, K, D).

    The text is start, K soft tokens, the prompt, end; a prompt too long for that is cut.
    """
    tokenizer, length, count = policy.tokenizer, policy.text_length, soft.shape[1]
    texts = tokenizer([str(p) for p in prompts], truncation=True,
                      max_length=length - count).input_ids
    ids = torch.full((len(texts), length), tokenizer.pad_token_id, device=policy.device)
    for row, text in zip(ids, texts, strict=True):
        room = text[1:2] * count                        # any token: its embedding is replaced
        row[:len(text) + count] = torch.tensor(text[:1] + room + text[1:], device=policy.device)
    embeddings = policy.text_encoder.get_input_embeddings()

    def put_in(module, given, output):
        return torch.cat([output[:, :1], soft.to(output.dtype), output[:, 1 + count:]], 1)

    def encode():
        hook = embeddings.register_forward_hook(put_in)
        try:
            return policy.text_encoder(ids).last_hidden_state
        finally:
            hook.remove()
    return encode


SOFT_PROMPT = Attack(soft_prompt, "after UnlearnDiffAtk, arXiv 2310.11868", uses=(
    "count", "tokens", "iterations", "lr", "tries", "steps", "eta", "guidance", "resolution",
    "batch_size", "unsafe_labels", "dtype"), settings={
    "embedded": {"tokens": 5, "iterations": 150, "lr": .01},
    "stable_diffusion": {"tokens": 5, "iterations": 2000, "lr": .01},   # theirs: 40 x 50 timesteps
})
