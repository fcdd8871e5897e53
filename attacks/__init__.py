"""Attacks on a defence, one paper per file, found by name.

    attack    an Attack: run(policy, prompts, args) -> [Adversarial], policy being the base model;
              or an Edit, as rivals/ have them, that trains a LoRA on top of the defended model

To add one: write its file, and its name here.
"""
from dataclasses import dataclass, field

ATTACKS = {
    "ring-a-bell": "attacks.ring_a_bell.RING_A_BELL",
    "ring-a-bell-embedding": "attacks.ring_a_bell.RING_A_BELL_EMBEDDING",
    "soft-prompt": "attacks.soft_prompt.SOFT_PROMPT",
    "fine-tune": "attacks.fine_tune.FINE_TUNE",
}


@dataclass
class Attack:
    """An attack, as attack.py runs it."""
    run: callable               # (policy, prompts, args) -> [Adversarial]
    paper: str
    uses: tuple = ()            # the options in args that it looks at, of those not all attacks do
    settings: dict = field(default_factory=dict)        # {recipe: {option: value}}


@dataclass
class Adversarial:
    """What an attack made of one prompt."""
    text: str
    original: str               # the Prompt that was attacked
    states: object = None       # text states (L, D) that stand for the text's own, or None
