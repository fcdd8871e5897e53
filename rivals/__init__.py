"""The rivals, one paper per file, found by name; a name swaps one for another.

    guide     (policy, prompts, scale) -> predict(x, t); scale a number or (B,), x (B, C, h, w)
              float32, t one timestep or (B,); predict gives the network's output (B, C, h, w),
              epsilon or v (policy.prediction_type)
    sampler   (policy, prompts, noise, schedule, scale, start=0) -> latents (B, C, h, w);
              noise[:, 0] is x at step `start`, noise[:, 1 + i] the noise of the i-th step taken
    blocker   (policy, prompts, noise, draw, pictures) -> blocked (N,) bool;
              draw(prompts, noise) -> pictures is the row's own sampler; before drawing,
              pictures is None
    edit      an Edit: step(job, prompts, rng) -> loss, and what it trains

What a guide, a sampler or a blocker steers away from is policy.concept, words with commas. Its
parameters whose default is a number are settings, given behind its name: dual-latent(weight=.3,
switch=20). To add one: write its file, and its name here; a line in systems.csv makes it a row of
the table (python evaluate.py --systems rivals/systems.csv --rows NAME).
"""
import inspect
import math
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module

from plumbing.options import UserError

GUIDES = {
    "plain": "model.plain",
    "negative": "rivals.negative.negative",
    "sld-weak": "rivals.sld.weak",
    "sld-weak-20": "rivals.sld.weak_20",
    "sld-medium": "rivals.sld.medium",
    "sld-strong": "rivals.sld.strong",
    "sld-max": "rivals.sld.maximum",
    "safree": "rivals.safree.safree",
    "safree-formula": "rivals.safree.safree_formula",
    "safree-always": "rivals.safree.safree_always",
}
SAMPLERS = {                            # DDIM's steps under a guide need no name of their own
    "pno": "rivals.pno.pno",
    "dual-latent": "rivals.dual_latent.dual_latent",
}
BLOCKERS = {
    "latent-guard": "rivals.latent_guard.latent_guard",
    "sc-pro": "rivals.sc_pro.sc_pro",
}
EDITS = {
    "esd-x": "rivals.esd.ESD_X",
    "esd-u": "rivals.esd.ESD_U",
    "sdd": "rivals.sdd.SDD",
    "safegen": "rivals.safegen.SAFEGEN",
    "duo": "rivals.duo.DUO",
    "eraseflow": "rivals.eraseflow.ERASEFLOW",
}


@dataclass
class Edit:
    """A weight edit, as erase.py trains it."""
    step: callable              # (job, its prompts, numpy generator) -> the loss, a scalar
    paper: str                  # named in the model card
    weights: str = ""           # regular expression: the names of the UNet's weights that learn
    prepare: callable = None    # (job, prompts, benign, labels) -> extra trained tensors, or None
    uses: tuple = ()            # the options that it looks at and not every edit does
    keeps_average: bool = False     # whether the weights' average is kept, and saved in the end
    ramps: bool = False         # whether the average's decay starts at 0, as diffusers' does
    max_grad_norm: float = float("inf")     # gradients are clipped to this norm, over all weights
    settings: dict = field(default_factory=dict)        # {recipe: {option: value}}; lora_lr is lr
                                                        # where a LoRA is trained

@dataclass
class Job:
    """What an edit's step works with."""
    policy: object
    args: object
    schedule: object
    trained: dict               # {name: parameter}: what learns
    start: dict                 # {name: tensor}: the same before training
    average: dict = None        # {name: tensor}: their average, for an edit that keeps one
    data: object = None         # what prepare made for the steps
    draw: callable = None       # (prompts, seeds) -> pictures uint8 (N, H, W, 3), under guidance


def settings_of(rival, recipe, models_own=None):
    """An edit's or attack's own settings, {option: value}.

    Of a recipe that it does not know: those of the model's own recipe, else the papers'.
    """
    for name in (recipe, models_own, "stable_diffusion"):
        if name in rival.settings:
            return rival.settings[name]
    return {}


def methods():
    """The names that --method takes: guides, samplers and blockers."""
    return [*GUIDES, *SAMPLERS, *BLOCKERS]


def is_method(text):
    return name_of_method(text) in methods()


def name_of_method(text):
    """dual-latent(weight=.3) -> dual-latent."""
    return text.partition("(")[0] if text.endswith(")") else text


def find_method(text, option):
    """(the table that a method's name is in, the method with the settings behind its name).

    UserError where the name is unknown, or a setting is, or is no number.
    """
    name = name_of_method(text)
    table = next((table for table in (GUIDES, SAMPLERS, BLOCKERS) if name in table), None)
    if table is None:
        raise UserError(f"{option}: {name} is unknown; give one of {', '.join(methods())}")
    method, settings = find(table, name, option), {}
    known = [parameter.name for parameter in inspect.signature(method).parameters.values()
             if isinstance(parameter.default, float | int) and parameter.name != "start"]
    for word in filter(None, text[len(name) + 1:-1].replace(",", " ").split()):
        key, _, value = word.partition("=")
        try:
            settings[key] = float(value)
            if key not in known or not math.isfinite(settings[key]):
                raise ValueError
        except ValueError:
            takes = ", ".join(f"{one}=NUMBER" for one in known) or "nothing"
            raise UserError(f"{option}: {name} has no setting {word!r}; it takes {takes}"
                            ) from None
    return table, partial(method, **settings) if settings else method


def unused_options(table, name):
    """The options that others of a table look at (`uses`) and this one does not, a set."""
    uses = {other: set(find(table, other, name).uses) for other in table}
    return set().union(*uses.values()) - uses[name]


def find(table, name, option):
    """The rival of a name; UserError if there is none."""
    if name not in table:
        raise UserError(f"{option}: {name} is unknown; give one of {', '.join(table)}")
    module, _, attribute = table[name].rpartition(".")
    return getattr(import_module(module), attribute)
