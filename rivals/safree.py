"""SAFREE (Yoon et al., arXiv 2410.12761): tokens near a concept are projected out of the prompt.

Letters: E the concept's text embeddings, P_c the projector onto their span; P_m the projector onto
the prompt's, each with one token blanked; e the text state of a token; D the states' width.
The paper's latent re-attention is left out, as it is dead code in the authors' release.
"""
import torch

from model import guided
from rivals.guiding import steps_done

ALPHA = .01                             # how far above the others' mean a trigger token lies
MOST = 10                               # of 50 steps, those that the changed states may have


def safree(policy, prompts, scale):
    """A guide: the changed states up to step n of 50 (from 0), then the prompt's own.

    n = 10 sigmoid(2 k (10 beta - t)), rounded, with k 2.5, t 5.333 and the change beta: the
    self-validating filter (section 3.2).
    """
    text = policy.encode(prompts)                                               # (B, L, D)
    safe = safe_states(policy, prompts, text)
    empty = policy.encode([""])
    before, after = guided(policy, safe, empty, scale), guided(policy, text, empty, scale)
    beta = 1 - torch.cosine_similarity(safe.float(), text.float(), dim=-1).mean(1)      # (B,)
    last = torch.round(MOST * torch.sigmoid(5 * (10 * beta - 5.333))).view(-1, 1, 1, 1)

    def predict(x, t):
        is_early = steps_done(policy, t) <= last                                # (B, 1, 1, 1)
        if is_early.all():
            return before(x, t)
        if not is_early.any():
            return after(x, t)
        return torch.where(is_early, before(x, t), after(x, t))
    return predict


def safree_always(policy, prompts, scale):
    """A guide: the changed states at every step, without the self-validating filter."""
    safe = safe_states(policy, prompts, policy.encode(prompts))
    return guided(policy, safe, policy.encode([""]), scale)


# ---- the text ------------------------------------------------------------------------------------

def safe_states(policy, prompts, text):
    """The prompts' states text (B, L, D) with those of their trigger tokens projected.

    A prompt that brings text states of its own has no words to project: it stays as it is.
    """
    words = [word.strip() for word in policy.concept.split(",")]
    concept = projector(pooled(policy, [policy.tokenizer(word).input_ids for word in words]))
    changed = []
    for prompt, states in zip(prompts, text, strict=True):
        if not getattr(prompt, "states", None):
            states = project_triggers(policy, prompt, states.float(), concept, ALPHA).to(states)
        changed.append(states)
    return torch.stack(changed)


def projector(columns):
    """P = E pinv(E^T E) E^T onto the span of E's columns; columns (n, D), one per row -> (D, D)."""
    e = columns.T.float()
    return e @ torch.linalg.pinv(e.T @ e) @ e.T


@torch.no_grad()
def pooled(policy, ids):
    """n token lists -> the states of their end tokens, CLIP's text embeddings before projection.

    Returns (n, D) float32.
    """
    length = max(map(len, ids))
    end = policy.tokenizer.eos_token_id
    rows = torch.tensor([one + [end] * (length - len(one)) for one in ids], device=policy.device)
    states = policy.text_encoder(rows).last_hidden_state.float()                # (n, length, D)
    return states[torch.arange(len(ids)), torch.tensor([len(one) - 1 for one in ids])]


def project_triggers(policy, prompt, states, concept, alpha):
    """A prompt's states (L, D) in which those of its trigger tokens are (I - P_c) P_m e.

    concept: P_c (D, D). A token is a trigger where the prompt without it lies further from the
    concept's span than (1 + alpha) times the mean of the others (section 3.1).
    """
    ids = policy.tokenizer(str(prompt), truncation=True, max_length=len(states)).input_ids
    count = len(ids) - 2                                # without start and end
    if count < 2:
        return states
    blanked = [ids[:i] + [0] + ids[i + 1:] for i in range(1, count + 1)]    # 0, "!": the authors'
    without = pooled(policy, blanked)                                           # (count, D)
    away = torch.eye(len(concept), device=concept.device) - concept             # I - P_c
    distance = (without @ away.T).norm(dim=1)                                   # (count,)
    others = (distance.sum() - distance) / (count - 1)
    is_trigger = torch.zeros(len(states), dtype=torch.bool, device=states.device)
    is_trigger[1:count + 1] = distance >= (1 + alpha) * others
    projected = states @ (away @ projector(without)).T                          # (L, D)
    return torch.where(is_trigger[:, None], projected, states)
