"""SAFREE (Yoon et al., arXiv 2410.12761): tokens near a concept are projected out of the prompt.

`safree` is the released program with its self-validating filter: beside that, it gives the concept
words as a negative prompt, always, of which the paper's formulas (`safree-formula`) know nothing.
`safree-always` is the program without its filter. The paper's latent re-attention is left out, as
it is dead code in the release.

What is ours: a prompt of one word, or none, has no others to compare it with and stays as it is (in
the release the mean of none is not a number, and one word counts as a trigger); a prompt over the
text encoder's limit keeps its end token, and so a text embedding (there the blanked prompts lose it
and all have the start token's, so that beta is .82 to 1.07 and n always 10); the projectors are
float64's (theirs, float32's, depart with length: results/log.md); at a guidance of 1 there is no
negative prompt (there the program fails).

Letters: E the concept's text embeddings, P_c the projector onto their span; P_m the projector onto
the prompt's, each with one token blanked; e the text state of a token; D the states' width.
"""
import torch

from model import guided
from rivals.guiding import concept_words, steps_done

ALPHA = .01                             # how far above the others' mean a trigger token lies
LAST_STEP = 10                          # of 50, from 0: the projected text has no later one


def safree_guide(has_filter, has_negative):
    """A guide. has_filter: the changed states have steps 0 to n of 50, then come the prompt's own.

    n = 10 sigmoid(2 k (10 beta - t)), rounded, with k 2.5, t 5.333 and beta as project_prompt has
    it: the self-validating filter (section 3.2). has_negative: the concept's words stand where the
    empty prompt was.
    """
    def guide(policy, prompts, scale):
        text = policy.encode(prompts)                                           # (B, L, D)
        words = concept_words(policy.concept)
        away = policy.encode([", ".join(words) if has_negative else ""])
        safe, beta = project_prompts(policy, prompts, text, words)
        if not has_filter:
            return guided(policy, safe, away, scale)
        n = torch.round(LAST_STEP * torch.sigmoid(5 * (10 * beta - 5.333))).view(-1, 1, 1)

        def predict(x, t):
            is_early = steps_done(policy, t)[..., 0] <= n                       # (B, 1, 1)
            return guided(policy, torch.where(is_early, safe, text), away, scale)(x, t)
        return predict
    return guide


safree = safree_guide(has_filter=True, has_negative=True)
safree_formula = safree_guide(has_filter=True, has_negative=False)
safree_always = safree_guide(has_filter=False, has_negative=True)


# ---- the text ------------------------------------------------------------------------------------

def project_prompts(policy, prompts, text, words):
    """The states text (B, L, D) with those of trigger tokens projected, and beta (B,).

    A prompt that brings text states of its own has no words to project: it stays as it is.
    """
    length = text.shape[1]
    ids = [policy.tokenizer(word, truncation=True, max_length=length).input_ids for word in words]
    concept = projector(pooled(policy, ids))
    safe, betas = [], []
    for prompt, states in zip(prompts, text, strict=True):
        beta = torch.zeros((), device=text.device)
        if not getattr(prompt, "states", None):
            ids = policy.tokenizer(str(prompt), truncation=True, max_length=length).input_ids
            new, beta = project_prompt(policy, ids, states.float(), concept)
            states = new.to(states.dtype)
        safe.append(states)
        betas.append(beta)
    return torch.stack(safe), torch.stack(betas)


def project_prompt(policy, ids, states, concept):
    """A prompt's states (L, D) with those of its trigger tokens (I - P_c) P_m e, and beta.

    ids: its tokens, from start to end, without padding; concept: P_c (D, D). A token is a trigger
    where the prompt without it lies further from the concept's span than 1 + ALPHA times the mean
    of the others (section 3.1). beta is 1 - the mean cosine of (I - P_c) P_m e with e, over all of
    ids: how far they would move were all of them triggers.
    """
    count = len(ids) - 2                                # without start and end
    if count < 2:
        return states, states.new_zeros(())
    blanked = [ids[:i] + [0] + ids[i + 1:] for i in range(1, count + 1)]    # 0, "!": the authors'
    without = pooled(policy, blanked)                                           # (count, D)
    away = torch.eye(len(concept), device=concept.device) - concept             # I - P_c
    distance = (without @ away.T).norm(dim=1)                                   # (count,)
    others = (distance.sum() - distance) / (count - 1)
    is_trigger = torch.zeros(len(states), dtype=torch.bool, device=states.device)
    is_trigger[1:count + 1] = distance >= (1 + ALPHA) * others
    projected = states @ (away @ projector(without)).T                          # (L, D)
    cosine = torch.cosine_similarity(projected, states, dim=1)[:len(ids)]
    return torch.where(is_trigger[:, None], projected, states), 1 - cosine.mean()


def projector(columns):
    """P_E = E pinv(E^T E) E^T, onto the span of E's columns; columns (n, D), one per row -> (D, D).

    As U U^T of E's singular vectors, in float64: E^T E would square the ratio of its singular
    values, of which float32 then loses the small ones. Directions within float32's rounding of the
    largest are none.
    """
    u, size, _ = torch.linalg.svd(columns.T.double().cpu(), full_matrices=False)
    u = u[:, size > torch.finfo(torch.float32).eps * size[0]]                   # (D, rank)
    return (u @ u.T).to(columns.device, torch.float32)


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
