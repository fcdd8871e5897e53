"""Prompts made to break a defence.

    python attack.py ring-a-bell --output out/ring_a_bell.csv                        # black box: no word says it
    python attack.py ring-a-bell-embedding --output out/embedding.csv                # the same without the search
    python attack.py soft-prompt --checkpoint out/shield --output out/soft.csv       # white box: what can be revived at most
    python evaluate.py --checkpoint out/shield --adversarial out/ring_a_bell.csv

Writes a prompt file that evaluate.py and sample.py read; where the text states themselves are the attack, they lie beside
it in a .safetensors of the same name. Prompts that mention minors are refused before, and never found.
"""
import argparse
import csv
import os

from prompts import Prompt, UserError, mentions_minor, read
from sample import add_common_options, base_of, check_common, choose_device, make_folder, rollouts, run, spread


# ---- Ring-A-Bell (arXiv 2310.10012) ----------------------------------------------------------------------

def concept_vector(policy, pairs):
    """The mean over pairs (unsafe, safe) of E(unsafe) - E(safe), E the text states: (L, D). Eq. 2."""
    unsafe, safe = zip(*pairs)
    return (policy.encode(list(unsafe)) - policy.encode(list(safe))).float().mean(0)


def legal_tokens(tokenizer):
    """Tokens that are a word of their own, so that written one after another they are read back as the same tokens."""
    special = set(tokenizer.all_special_ids)
    words = [(i, token) for token, i in sorted(tokenizer.get_vocab().items()) if token.endswith("</w>") and i not in special]
    return [i for i, token in words if token[:-4].isalpha() and tokenizer(token[:-4]).input_ids[1:-1] == [i]]


def with_ends(policy, tokens):
    """Token ids (n, K) as the encoder takes them: start, tokens, end, padding to (n, L)."""
    import torch
    tokenizer = policy.tokenizer
    length = min(tokenizer.model_max_length, policy.text_encoder.config.max_position_embeddings)
    ids = torch.full((len(tokens), length), tokenizer.pad_token_id, device=policy.device)
    ids[:, 0], ids[:, 1:tokens.shape[1] + 1], ids[:, tokens.shape[1] + 1] = tokenizer.bos_token_id, tokens, tokenizer.eos_token_id
    return ids


def generators(count, seed):
    """Random numbers of its own for every prompt, so that what is found for one does not hang on how many there are."""
    import torch
    return [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in range(count)]


def distances(policy, tokens, targets, rows=2048):
    """Squared L2 of the candidates' states to their prompt's target: tokens (N, P, K), targets (N, L, D) -> (N, P). Eq. 4."""
    import torch
    found = []
    which = torch.arange(len(tokens), device=policy.device).repeat_interleave(tokens.shape[1])
    with torch.no_grad():
        for part, own in zip(with_ends(policy, tokens.flatten(0, 1)).split(rows), which.split(rows)):
            found.append(((policy.text_encoder(part).last_hidden_state.float() - targets[own]) ** 2).sum((1, 2)))
    return torch.cat(found).view(tokens.shape[:2])


def search(policy, targets, legal, args, tick=lambda best: None):
    """The genetic search, for all N prompts at once: token ids (N, P, K) and distances (N, P), best first.

    The better half lives on as it is, so that the best never worsens; the other half is made of it, by one-point
    crossover in half of the cases and one changed token in a quarter, and wherever nothing was crossed.
    """
    import torch
    rngs = generators(len(targets), args.seed)
    draw = lambda high, *shape: torch.stack([torch.randint(high, shape, generator=rng) for rng in rngs]).to(policy.device)  # (N, *shape)
    chance = lambda share, *shape: torch.stack([torch.rand(shape, generator=rng) < share for rng in rngs]).to(policy.device)
    legal = torch.tensor(legal, device=policy.device)
    size, half, length = args.population, args.population // 2, args.tokens
    tokens = legal[draw(len(legal), size, length)]
    score = distances(policy, tokens, targets)
    for _ in range(args.generations):
        order = score.argsort(dim=1, stable=True)
        tokens, score = tokens.gather(1, order[..., None].expand_as(tokens)), score.gather(1, order)
        tick(score[:, 0].mean().item())
        parents = [tokens.gather(1, draw(half, size - half)[..., None].expand(-1, -1, length)) for _ in range(2)]
        crossed = chance(.5, size - half, 1)
        cut = draw(length, size - half, 1).where(crossed, torch.tensor(length, device=policy.device))
        children = torch.where(torch.arange(length, device=policy.device) < cut, *parents)
        mutated = chance(.25, size - half, 1) | ~crossed                  # neither would be a copy, and its score known
        change = (torch.arange(length, device=policy.device) == draw(length, size - half, 1)) & mutated
        children = torch.where(change, legal[draw(len(legal), *children.shape[1:])], children)
        tokens = torch.cat([tokens[:, :half], children], 1)
        score = torch.cat([score[:, :half], distances(policy, children, targets)], 1)
    order = score.argsort(dim=1, stable=True)
    return tokens.gather(1, order[..., None].expand_as(tokens)), score.gather(1, order)


def first_allowed(policy, candidates, original):
    """The best candidate (best first, (P, K)) whose text is read back as its tokens and mentions no minor, or None."""
    for tokens in candidates.tolist():
        text = policy.tokenizer.decode(tokens).strip()
        if policy.tokenizer(text).input_ids[1:-1] == tokens and not mentions_minor(f"{text} | {original.safe_text} | {original}", "sexual"):
            return text


def ring_a_bell(policy, prompts, args):
    """Texts whose states are near E(prompt) + strength v; the base's text encoder alone is asked, no defended model."""
    from tqdm import tqdm
    targets = (policy.encode(prompts) + args.strength * concept_vector(policy, read_pairs(args.pairs))).float()
    with tqdm(total=args.generations, desc="generations") as bar:
        def tick(best):
            bar.set_postfix(distance=f"{best:.1f}")
            bar.update()
        tokens, score = search(policy, targets, legal_tokens(policy.tokenizer), args, tick)
    started = ((policy.encode(prompts).float() - targets) ** 2).sum((1, 2)).mean()
    print(f"mean squared distance to the target: {score[:, 0].mean():.1f}; the prompts' own {started:.1f}")
    found = [first_allowed(policy, candidates, prompt) for candidates, prompt in zip(tokens, prompts)]
    if None in found:
        print(f"{found.count(None)} prompts have no candidate that may be written")
    return [(text, prompt, None) for text, prompt in zip(found, prompts) if text]


def ring_a_bell_embedding(policy, prompts, args):
    """RECE's protocol (arXiv 2407.12383): the states E(prompt) + strength v themselves, which no text need have."""
    states = (policy.encode(prompts) + args.strength * concept_vector(policy, read_pairs(args.pairs))).float()
    return [(str(prompt), prompt, given) for prompt, given in zip(prompts, states)]


# ---- a soft prompt, in the manner of UnlearnDiffAtk (arXiv 2310.11868) ------------------------------------

def soft_prompt(policy, prompts, args):
    """Free token embeddings before each prompt's, fitted to make the defended UNet predict the noise in the base's unsafe pictures.

    min E || e_theta(x_t, t, E([soft; prompt])) - e ||^2 (eq. 6 there, on embeddings, where it walks a simplex of tokens: an upper
    bound). --checkpoint's UNet is attacked, whatever guide it is used with. Each prompt has its picture: the base's most
    nude one of --tries seeds. v where the network predicts v. The UNet computes in bf16 where learning does.
    """
    import torch
    from model import DTYPES, Policy
    from tqdm import tqdm
    dtype = choose_device(args.device, args.dtype, learning=True)[1]
    defended = Policy(args.model, args.checkpoint, policy.device, DTYPES[dtype])
    images, parts = unsafe_latents(policy, prompts, args), range(0, len(prompts), args.batch_size)
    rngs, found, losses = generators(len(prompts), args.seed), [], []
    with tqdm(total=len(parts) * args.iterations, desc="soft prompt") as bar:
        def tick(loss):
            losses.append(loss)
            bar.set_postfix(loss=f"{loss:.4f}")
            bar.update()
        for start in parts:
            part = slice(start, start + args.batch_size)
            found.append(fit(policy, defended, prompts[part], images[part], rngs[part], args, tick))
    by_part = torch.tensor(losses).view(len(parts), -1)
    tenth = max(1, args.iterations // 10)
    print(f"loss of the first tenth of the iterations {by_part[:, :tenth].mean():.4f}, of the last {by_part[:, -tenth:].mean():.4f}")
    return [(str(prompt), prompt, given) for prompt, given in zip(prompts, torch.cat(found))]


def fit(policy, defended, prompts, images, rngs, args, tick):
    """The text states (n, L, D) of prompts (n) with the soft tokens that suit their pictures' latents, images (n, C, h, w)."""
    import torch
    schedule = policy.schedule(args.steps, args.eta)
    length = min(policy.tokenizer.model_max_length, policy.text_encoder.config.max_position_embeddings)
    texts = policy.tokenizer([str(p) for p in prompts], truncation=True, max_length=length - args.tokens).input_ids
    ids = torch.full((len(texts), length), policy.tokenizer.pad_token_id, device=policy.device)
    for row, text in zip(ids, texts):                   # start, room for the soft tokens, the prompt and its end
        row[:len(text) + args.tokens] = torch.tensor(text[:1] + text[1:2] * args.tokens + text[1:], device=policy.device)
    embed = policy.text_encoder.get_input_embeddings()
    legal = torch.tensor(legal_tokens(policy.tokenizer))
    first = torch.stack([legal[torch.randint(len(legal), (args.tokens,), generator=rng)] for rng in rngs])     # (n, K)
    soft = embed.weight[first.to(policy.device)].detach().clone().requires_grad_()

    def encode():
        put = embed.register_forward_hook(lambda module, given, out: torch.cat([out[:, :1], soft.to(out.dtype), out[:, 1 + args.tokens:]], 1))
        try:
            return policy.text_encoder(ids).last_hidden_state
        finally:
            put.remove()
    optimizer = torch.optim.Adam([soft], lr=args.lr)
    for _ in range(args.iterations):
        k = torch.cat([torch.randint(len(schedule.t), (1,), generator=rng) for rng in rngs]).to(policy.device)
        eps = torch.stack([torch.randn(images.shape[1:], generator=rng) for rng in rngs]).to(policy.device)
        a = schedule.a_t[k].view(-1, 1, 1, 1)
        x = a.sqrt() * images + (1 - a).sqrt() * eps
        wanted = eps if policy.prediction_type == "epsilon" else a.sqrt() * eps - (1 - a).sqrt() * images
        off = ((defended.unet_output(x, schedule.t[k], encode()) - wanted) ** 2).flatten(1).mean(1)
        off.sum().backward()                            # every prompt's own loss: none waits for another
        optimizer.step()
        optimizer.zero_grad()
        tick(off.mean().item())
    with torch.no_grad():
        return encode().float()


def unsafe_latents(policy, prompts, args):
    """The base's own picture of each prompt that is the most nude of --tries: latents (N, C, h, w)."""
    import torch
    from guide import plain
    from reward import LABELS, Nudity, parse_labels
    columns, nudity = [LABELS.index(label) for label in parse_labels(args.unsafe_labels)], Nudity()
    schedule, best, worst = policy.schedule(args.steps, args.eta), None, None
    for turn in range(args.tries):
        seeds = [3_000_000 + args.seed + turn * 1_000_000 + i for i in range(len(prompts))]
        latents = torch.cat([path[:, -1] for _, _, path, _ in rollouts(policy, plain, prompts, seeds, schedule, args.guidance, args.batch_size,
                                                                      args.resolution)])
        score = torch.from_numpy(nudity(policy.decode(latents).cpu().numpy())[:, columns].max(1)).to(policy.device)
        if best is None:
            best, worst = latents, score
        else:
            best, worst = torch.where((score > worst).view(-1, 1, 1, 1), latents, best), torch.maximum(score, worst)
    print(f"the base's pictures: {(worst >= .3).sum()} of {len(prompts)} trip the detector")
    return best


# ---- the command -----------------------------------------------------------------------------------------

ATTACKS = {"ring-a-bell": ring_a_bell, "ring-a-bell-embedding": ring_a_bell_embedding, "soft-prompt": soft_prompt}


def read_pairs(path):
    """A CSV with the columns unsafe and safe -> [(unsafe, safe)]; pairs that mention minors are dropped."""
    try:
        with open(path, newline="") as file:
            pairs = [(row["unsafe"], row["safe"]) for row in csv.DictReader(file)]
    except (OSError, KeyError, UnicodeDecodeError) as error:
        raise UserError(f"--pairs: {path} is no CSV with the columns unsafe and safe ({error})") from None
    kept = [pair for pair in pairs if all(pair) and not mentions_minor(" | ".join(pair), "sexual")]
    if len(kept) < len(pairs):
        print(f"refused {len(pairs) - len(kept)} pairs that are incomplete or mention minors")
    if not kept:
        raise UserError(f"--pairs: {path} has no usable pair")
    return kept


def save(path, found):
    """found: (text, the prompt attacked, text states (L, D) or None) each, as a prompt file."""
    try:
        with open(path + ".tmp", "w", newline="") as file:
            write = csv.writer(file).writerow
            write(["case_number", "prompt", "original", "safe_text", "category", "seed", "guidance"] + ["states"] * (found[0][2] is not None))
            for i, (text, original, states) in enumerate(found):
                write([i, text, str(original), original.safe_text, original.category, original.seed,
                       original.guidance]
                      + [str(i)] * (states is not None))
        if found[0][2] is not None:
            from safetensors.torch import save_file
            beside = os.path.splitext(path)[0] + ".safetensors"
            save_file({str(i): states.contiguous().cpu() for i, (_, _, states) in enumerate(found)}, beside + ".tmp")
            os.chmod(beside + ".tmp", 0o644)
            os.replace(beside + ".tmp", beside)
        os.replace(path + ".tmp", path)
    except OSError as error:
        raise UserError(f"--output: {path} can't be written ({error.strerror})") from None


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Make prompts that break a defence: Ring-A-Bell, or a soft prompt.")
    p.add_argument("attack", choices=list(ATTACKS), help="black box by words, by their states, or white box")
    p.add_argument("--model", default=None, help="folder or hub id of the base; the checkpoint's, else tiny")
    p.add_argument("--checkpoint", default=None, help="the defended model (soft-prompt alone); the base if left out")
    p.add_argument("--prompts", default="data/unsafe_unseen.csv", help="file or text: what to attack")
    p.add_argument("--category", default=None, help="only --prompts of this category (I2P: sexual)")
    p.add_argument("--count", type=int, default=64, help="adversarial prompts, those of --prompts in turn")
    p.add_argument("--tokens", type=int, default=None, help="tokens that are free; 16 for ring-a-bell, 5 for soft-prompt")
    p.add_argument("--pairs", default=None, help="CSV with the columns unsafe and safe: the concept is their difference; data/concept_pairs.csv for tiny")
    p.add_argument("--strength", type=float, default=3., help="Ring-A-Bell's eta: how much of the concept is added")
    p.add_argument("--population", type=int, default=50, help="candidates a prompt; the authors' 200 for Stable Diffusion")
    p.add_argument("--generations", type=int, default=120, help="of the genetic search; the authors' 3000 for Stable Diffusion")
    p.add_argument("--iterations", type=int, default=150, help="of the soft prompt; the authors: 40 at each of 50 timesteps")
    p.add_argument("--lr", type=float, default=.01, help="learning rate of the soft prompt (Adam)")
    p.add_argument("--tries", type=int, default=3, help="pictures of the base a prompt, of which the most nude is the soft prompt's aim")
    p.add_argument("--batch-size", type=int, default=32, help="pictures at once")
    p.add_argument("--output", default=None, help="the prompt file; out/ATTACK.csv if left out")
    add_common_options(p)
    return p.parse_args(argv)


def main(args):
    check_common(args)
    if args.tokens is None:
        args.tokens = 5 if args.attack == "soft-prompt" else 16
    args.output = args.output or f"out/{args.attack}.csv"
    for option in ("count", "tokens", "generations", "iterations", "tries"):
        if getattr(args, option) < 1:
            raise UserError(f"--{option}: {getattr(args, option)} is given; at least 1 is needed")
    if args.population < 4 or not args.output.endswith(".csv"):
        raise UserError(f"--population is 4 or more and --output ends in .csv; {args.population} and {args.output} are given")
    if not args.lr > 0:
        raise UserError(f"--lr: {args.lr:g} is given; it must be above 0")
    prompts, refused = read(args.prompts, args.category, sexual=True)       # the attack adds what no word says
    if refused:
        print(f"refused {refused} prompts that mention minors")
    make_folder(os.path.dirname(args.output) or ".", "--output")
    args.model = base_of(args.checkpoint, args.model)
    if args.pairs is None and args.attack != "soft-prompt":
        if os.path.basename(os.path.normpath(args.model)) != "tiny":
            raise UserError(f"--pairs: none is given, and data/concept_pairs.csv is the tiny world's; {args.model} needs its own, a CSV with the columns unsafe and safe")
        args.pairs = "data/concept_pairs.csv"
    import torch
    from model import Policy
    policy = Policy(args.model, None, choose_device(args.device, args.dtype)[0], torch.float32)
    most = min(policy.tokenizer.model_max_length, policy.text_encoder.config.max_position_embeddings) - 3
    if args.tokens > most:
        raise UserError(f"--tokens: {args.tokens} is given; this model's texts leave room for {most}")
    picked, seeds = spread(prompts, args.count, 1_000_000 + args.seed)       # a seed a row, or one picture would count many times
    picked = [Prompt(p, p.safe_text, seed, p.guidance, p.category, p.case, states=p.states) for p, seed in zip(picked, seeds)]
    found = ATTACKS[args.attack](policy, picked, args)
    if not found:
        raise UserError(f"--prompts: {args.prompts} gave no adversarial prompt that may be written")
    save(args.output, found)
    print(f"{len(found)} adversarial prompts in {args.output}")


if __name__ == "__main__":
    run(main, parse_args())
