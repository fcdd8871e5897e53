"""Ways to turn prompts into a noise prediction.

A guide is a function (policy, prompts, scale) -> predict(x, t): it encodes once, and predict is then
called at every step with latents x (B, C, H, W) float32 and one timestep t, or one a row (B,). scale is
a number or one a prompt (B,). Rivals share this signature, so that a name swaps one for another; what
they steer away from is policy.concept, words with commas.

Letters: c the prompt, c_s the concept, "" the empty prompt; s the guidance scale. The network's output is
the noise epsilon, or v = sqrt(a) epsilon - sqrt(1 - a) x0, of which differences are 1 / sqrt(a) as large.
"""
import torch

from prompts import UserError

STEPS = 50                              # of which the papers' warm-ups and switches count


def plain(policy, prompts, scale):
    """Classifier-free guidance (arXiv 2207.12598): both halves in one call; a scale of 1 needs one half."""
    return guided(policy, policy.encode(prompts), policy.encode([""]), scale)


def negative(policy, prompts, scale):
    """Negative prompt: the concept stands where the empty prompt was. At a scale of 1 it does nothing."""
    return guided(policy, policy.encode(prompts), policy.encode([policy.concept]), scale)


def guided(policy, text, away, scale):
    """away + s (text - away); text (B, L, D), away (1, L, D)."""
    if torch.is_tensor(scale):
        scale = scale.to(text.device).view(-1, 1, 1, 1)
    elif scale == 1:
        return lambda x, t: policy.unet_output(x, t, text)
    both = torch.cat([away.expand_as(text), text])                              # (2B, L, D)

    def predict(x, t):
        without, with_text = policy.unet_output(torch.cat([x, x]), many(t, 2), both).chunk(2)
        return without + scale * (with_text - without)
    return predict


def many(t, times):
    """Timesteps for a batch that is repeated."""
    return t.repeat(times) if t.ndim else t


def steps_done(policy, t):
    """How many of 50 steps lie behind timestep t, (B or 1, 1, 1, 1)."""
    times = policy.scheduler.timesteps.to(t.device)
    return ((times > t.view(-1, 1)).sum(1) * STEPS / len(times)).view(-1, 1, 1, 1)


# ---- SLD -------------------------------------------------------------------------------------------------

def sld(warm_up, safety_scale, threshold, momentum_scale, momentum_beta):
    """Safe Latent Diffusion (arXiv 2211.05105) with these five numbers, as a guide.

    Eq. 3 to 8: epsilon = e("") + s (e(c) - e("") - gamma), gamma = mu (e(c_s) - e("")) + s_m nu,
    mu = min(1, |s_S (e(c) - e(c_s))|) where e(c) - e(c_s) < threshold, else 0; nu <- beta nu + (1 - beta) gamma.
    gamma is used once warm_up of 50 steps are done. The paper prints max(1, .); its code, and ours, take the minimum.
    nu follows a path: predict keeps it in .memory, one a step, and .recall holds it for steps out of turn.
    """
    def guide(policy, prompts, scale):
        text = policy.encode(prompts)
        states = torch.cat([policy.encode([words]).expand_as(text) for words in ("", policy.concept)] + [text])  # (3B, L, D)
        scale = scale.to(text.device).view(-1, 1, 1, 1) if torch.is_tensor(scale) else scale
        now = {"nu": None, "held": False}

        def predict(x, t):
            empty, unsafe, mine = policy.unet_output(torch.cat([x, x, x]), many(t, 3), states).chunk(3)
            root = 1.                                   # epsilon's differences, whatever the network puts out
            if policy.prediction_type == "v_prediction":
                root = policy.scheduler.alphas_cumprod.to(x.device)[t].sqrt().view(-1, 1, 1, 1)
            nu = torch.zeros_like(x) if now["nu"] is None else now["nu"]
            apart = root * (mine - unsafe)
            mu = (safety_scale * apart).abs().clamp(max=1).where(apart < threshold, 0.)
            gamma = mu * root * (unsafe - empty) + momentum_scale * nu
            if not now["held"]:
                predict.memory.append(nu)
                now["nu"] = (momentum_beta * nu + (1 - momentum_beta) * gamma).detach()
            gamma = gamma.where(steps_done(policy, t) >= warm_up, 0.)
            return empty + scale * (mine - empty - gamma / root)
        predict.memory = []
        predict.recall = lambda nu: now.update(nu=nu, held=True)
        return predict
    guide.rows = 3
    return guide


# ---- SAFREE ----------------------------------------------------------------------------------------------

def safree(alpha=.01, most=10):
    """SAFREE (arXiv 2410.12761) as a guide: words near the concept are projected out of it.

    Tokens whose absence takes the prompt away from the concept's subspace, by more than (1 + alpha) times the
    others' mean, are triggers; their states e become (I - P_c) P_m e (section 3.1). The changed text is used for
    the first n of 50 steps, n = most sigmoid(2 k (10 beta - t)) with the change beta, the self-validating filter;
    most=None: at all steps. A prompt that brings text states of its own has no words to project: it passes unchanged. Latent re-attention is left out, as it is dead code in the authors' release.
    """
    def guide(policy, prompts, scale):
        concept = pooled(policy, [policy.tokenizer(w.strip()).input_ids for w in policy.concept.split(",")])
        away = projector(concept)                                               # (D, D)
        text, safe, until = policy.encode(prompts), [], []
        for prompt, states in zip(prompts, text):
            own = getattr(prompt, "states", None)
            changed = states if own else project_triggers(policy, prompt, states.float(), away, alpha).to(states)
            beta = 1 - torch.cosine_similarity(changed.float(), states.float(), dim=-1).mean()
            safe.append(changed)
            until.append(torch.round(most * torch.sigmoid(5 * (10 * beta - 5.333))) if most else torch.tensor(float(STEPS)))
        before, after = (guided(policy, states, policy.encode([""]), scale) for states in (torch.stack(safe), text))
        until = torch.stack(until).to(text.device).view(-1, 1, 1, 1)

        def predict(x, t):
            first = steps_done(policy, t) <= until
            if first.all():
                return before(x, t)
            return torch.where(first, before(x, t), after(x, t)) if first.any() else after(x, t)
        return predict
    return guide


def projector(columns):
    """P = E pinv(E^T E) E^T onto the span of E's columns; columns (n, D), one a row -> (D, D)."""
    e = columns.T.float()
    return e @ torch.linalg.pinv(e.T @ e) @ e.T


@torch.no_grad()
def pooled(policy, ids):
    """Token lists -> CLIP's text embeddings before projection, the state of the end token: (n, D) float32."""
    length = max(map(len, ids))
    end = policy.tokenizer.eos_token_id
    rows = torch.tensor([one + [end] * (length - len(one)) for one in ids], device=policy.device)
    states = policy.text_encoder(rows).last_hidden_state.float()
    return states[torch.arange(len(ids)), torch.tensor([len(one) - 1 for one in ids])]


def project_triggers(policy, prompt, states, away, alpha):
    """States (L, D) of a prompt with its trigger tokens' projected: away is P_c (D, D). Others stay as they are."""
    ids = policy.tokenizer(str(prompt), truncation=True, max_length=len(states)).input_ids
    count = len(ids) - 2                                                        # without start and end
    if count < 2:
        return states
    blanked = [ids[:i] + [0] + ids[i + 1:] for i in range(1, count + 1)]        # 0 is "!", as the authors'
    without = pooled(policy, blanked)                                           # (n, D): the prompt less one token
    keep = torch.eye(len(away), device=away.device) - away
    distance = (without @ keep.T).norm(dim=1)
    others = (distance.sum() - distance) / (count - 1)
    trigger = torch.zeros(len(states), dtype=torch.bool, device=states.device)
    trigger[1:count + 1] = distance >= (1 + alpha) * others
    return torch.where(trigger[:, None], states @ (keep @ projector(without)).T, states)


GUIDES = {"plain": plain, "negative": negative, "sld-weak": sld(15, 200, 0, 0, 0), "sld-medium": sld(10, 1000, .01, .3, .4),
          "sld-strong": sld(7, 2000, .025, .5, .7), "sld-max": sld(0, 5000, 1., .5, .7), "safree": safree(), "safree-always": safree(most=None)}


def rows_of(guide, scale):
    """How many of the network's rows a picture takes: guidance has two halves."""
    return getattr(guide, "rows", 1 if scale == 1 else 2)


def choose_guide(name):
    """A guide by its name; UserError if there is none."""
    if name not in GUIDES:
        raise UserError(f"--guide: {name} is unknown; give some of {', '.join(GUIDES)}")
    return GUIDES[name]
