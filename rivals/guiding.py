"""What several rivals share: steps as the papers count them, and a concept's words."""
from plumbing.options import UserError

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
