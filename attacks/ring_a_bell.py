"""Ring-A-Bell (Tsai et al., ICLR 2024, arXiv 2310.10012): words whose text states hold a concept.

A black box's attack: only the base model's text encoder is asked, never the defended model.

Letters: E(.) a text's states (L, D); v the concept's direction; N prompts, each with P candidates
of K tokens.
"""
import torch
from tqdm import tqdm

from attacks import Adversarial, Attack
from attacks.tokens import draw_chances, draw_integers, generators, legal_tokens
from plumbing.refusal import mentions_minor


def ring_a_bell(policy, prompts, args):
    """Texts whose states are near E(prompt) + strength v, by a genetic search over tokens."""
    targets = concept_targets(policy, prompts, args)                            # (N, L, D)
    legal = legal_tokens(policy.tokenizer)
    with tqdm(total=args.generations, desc="generations") as bar:
        def tick(best):
            bar.set_postfix(distance=f"{best:.1f}")
            bar.update()
        tokens, score = search(policy, targets, legal, args, tick)
    own = ((policy.encode(prompts).float() - targets) ** 2).sum((1, 2)).mean()
    print(f"mean squared distance to the target: {score[:, 0].mean():.1f}; "
          f"the prompts' own {own:.1f}")
    written = []
    for candidates, prompt in zip(tokens, prompts, strict=True):
        text = first_allowed(policy, candidates, prompt)
        if text:
            written.append(Adversarial(text, prompt))
    if len(written) < len(prompts):
        print(f"{len(prompts) - len(written)} prompts have no candidate that may be written")
    return written


def ring_a_bell_embedding(policy, prompts, args):
    """The states E(prompt) + strength v themselves, which no text need have.

    RECE's protocol (arXiv 2407.12383), which calls it Ring-A-Bell, too.
    """
    states = concept_targets(policy, prompts, args)
    return [Adversarial(str(prompt), prompt, own)
            for prompt, own in zip(prompts, states, strict=True)]


# ---- the concept ---------------------------------------------------------------------------------

def concept_targets(policy, prompts, args):
    """E(prompt) + strength v: (N, L, D) float32 (equation 3)."""
    v = concept_vector(policy, args.pairs)
    return (policy.encode(prompts) + args.strength * v).float()


def concept_vector(policy, pairs):
    """v, the mean over pairs (unsafe, safe) of E(unsafe) - E(safe): (L, D) (equation 2)."""
    unsafe, safe = zip(*pairs, strict=True)
    return (policy.encode(list(unsafe)) - policy.encode(list(safe))).float().mean(0)


# ---- the search ----------------------------------------------------------------------------------

def search(policy, targets, legal, args, tick=lambda best: None):
    """The genetic search for all prompts at once.

    targets: (N, L, D); legal: the ids to choose from; args: population (P), tokens (K),
    generations, seed. Returns token ids (N, P, K) and squared distances (N, P), best first. The
    better half survives as it is, so that the best never worsens; its children replace the rest.
    """
    rngs = generators(len(targets), args.seed)
    legal = torch.tensor(legal, device=policy.device)
    half = args.population // 2
    first = draw_integers(rngs, len(legal), args.population, args.tokens).to(policy.device)
    tokens = legal[first]                                                       # (N, P, K)
    score = distances(policy, tokens, targets)                                  # (N, P)
    for _ in range(args.generations):
        tokens, score = best_first(tokens, score)
        tick(score[:, 0].mean().item())
        children = breed(tokens, half, legal, rngs)                             # (N, P - P // 2, K)
        tokens = torch.cat([tokens[:, :half], children], 1)
        score = torch.cat([score[:, :half], distances(policy, children, targets)], 1)
    return best_first(tokens, score)


def best_first(tokens, score):
    """Candidates (N, P, K) and their distances (N, P), sorted by these."""
    order = score.argsort(dim=1, stable=True)
    return tokens.gather(1, order[..., None].expand_as(tokens)), score.gather(1, order)


def breed(tokens, half, legal, rngs):
    """Children (N, P - half, K) of the better half of tokens (N, P, K), best first.

    One-point crossover of two parents in half of the cases; one token changed in a quarter of
    them, and wherever nothing was crossed: a copy's distance is known.
    """
    length, count, device = tokens.shape[2], tokens.shape[1] - half, tokens.device
    place = torch.arange(length, device=device)

    def parents():
        chosen = draw_integers(rngs, half, count).to(device)                    # (N, count)
        return tokens.gather(1, chosen[..., None].expand(-1, -1, length))       # (N, count, K)
    mother, father = parents(), parents()
    is_crossed = draw_chances(rngs, .5, count, 1).to(device)
    cut = draw_integers(rngs, length, count, 1).to(device)
    cut = cut.where(is_crossed, torch.tensor(length, device=device))            # uncut: mother's
    children = torch.where(place < cut, mother, father)
    is_mutated = draw_chances(rngs, .25, count, 1).to(device) | ~is_crossed
    changed = (place == draw_integers(rngs, length, count, 1).to(device)) & is_mutated
    others = legal[draw_integers(rngs, len(legal), count, length).to(device)]
    return torch.where(changed, others, children)


@torch.no_grad()
def distances(policy, tokens, targets, rows=2048):
    """Squared L2 of the candidates' states to their prompt's target (equation 4).

    tokens (N, P, K), targets (N, L, D) -> (N, P); rows: texts encoded at once, to bound memory.
    """
    ids = with_ends(policy, tokens.flatten(0, 1))                               # (N P, L)
    prompt = torch.arange(len(tokens), device=policy.device).repeat_interleave(tokens.shape[1])
    parts = []
    for some_ids, some_prompts in zip(ids.split(rows), prompt.split(rows), strict=True):
        states = policy.text_encoder(some_ids).last_hidden_state.float()
        parts.append(((states - targets[some_prompts]) ** 2).sum((1, 2)))
    return torch.cat(parts).view(tokens.shape[:2])


def with_ends(policy, tokens):
    """Token ids (n, K) as the encoder takes them: start, tokens, end, padding to (n, L)."""
    tokenizer, count = policy.tokenizer, tokens.shape[1]
    shape = (len(tokens), policy.text_length)
    ids = torch.full(shape, tokenizer.pad_token_id, device=policy.device)
    ids[:, 0] = tokenizer.bos_token_id
    ids[:, 1:count + 1] = tokens
    ids[:, count + 1] = tokenizer.eos_token_id
    return ids


def first_allowed(policy, candidates, original):
    """The text of the best candidate that may be written, or None.

    candidates: (P, K), best first. The text must be read back as the same tokens and mention no
    minor.
    """
    for tokens in candidates.tolist():
        text = policy.tokenizer.decode(tokens).strip()
        everything = f"{text} | {original.safe_text} | {original}"
        is_readable = policy.tokenizer(text).input_ids[1:-1] == tokens
        if is_readable and not mentions_minor(everything, "sexual"):
            return text
    return None


RING_A_BELL = Attack(ring_a_bell, "Ring-A-Bell, arXiv 2310.10012", uses=(
    "count", "pairs", "strength", "tokens", "population", "generations"), settings={
    "embedded": {"tokens": 16, "strength": 3., "population": 50, "generations": 120},
    "stable_diffusion": {"tokens": 16, "strength": 3., "population": 200, "generations": 3000},
})
RING_A_BELL_EMBEDDING = Attack(
    ring_a_bell_embedding, "RECE, arXiv 2407.12383", uses=("count", "pairs", "strength"), settings={
        "embedded": {"strength": 3.},
        "stable_diffusion": {"strength": 3.},
    })
