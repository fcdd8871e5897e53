"""Negative prompt: the concept stands where the empty prompt was.

Ho and Salimans, "Classifier-free diffusion guidance", arXiv 2207.12598, with other words in the
unconditional branch, as is common practice.
"""
from model import guided


def negative(policy, prompts, scale):
    """A guide: e(concept) + s (e(prompt) - e(concept)). At a scale of 1 it does nothing."""
    return guided(policy, policy.encode(prompts), policy.encode([policy.concept]), scale)
