"""What several rivals share: steps as the papers count them, a concept's words, safe text."""
from plumbing.options import UserError
from plumbing.pairs import read_pairs

STEPS = 50                              # the papers' warm-ups and switches count steps of 50


def steps_done(policy, t):
    """How many of 50 steps lie behind timestep t, one number or (B,): (1 or B, 1, 1, 1)."""
    times = policy.scheduler.timesteps.to(t.device)                             # (T,)
    done = (times > t.view(-1, 1)).sum(1)                                       # of T steps
    return (done * STEPS / len(times)).view(-1, 1, 1, 1)


def concept_words(concept):
    """A concept's words or phrases, which commas part, each once."""
    words = dict.fromkeys(word.strip() for word in concept.split(",") if word.strip())
    if not words:
        raise UserError(f"--concept: {concept!r} has no word; give some, with commas between them")
    return list(words)


def check_safe_text(policy, prompts):
    """UserError where nothing says what the prompts' safe pictures would show."""
    if not policy.world.concept_pairs and all(p.safe_text == p for p in prompts):
        raise UserError("--prompts: no prompt has a safe_text, and the model names no "
                        "concept_pairs; give a file with the column safe_text")


def safe_states(policy, prompts):
    """Text states (B, L, D) that ask for what the prompts ask for, drawn safely.

    The prompts' own, moved by the mean difference of the safe and the unsafe texts of the model's
    concept_pairs (world.json); without such a file those of each prompt's safe_text.
    """
    if not policy.world.concept_pairs:
        return policy.encode([getattr(prompt, "safe_text", prompt) for prompt in prompts])
    unsafe, safe = zip(*read_pairs(policy.world.concept_pairs), strict=True)
    return policy.encode(prompts) + policy.encode(safe).mean(0) - policy.encode(unsafe).mean(0)
