"""What several attacks share: tokens that can be written, and random numbers of each prompt's own.

N prompts; rngs is a list of N generators, so that what is drawn for one prompt does not depend on
how many there are.
"""
import torch


def legal_tokens(tokenizer):
    """Ids of tokens that are a word of their own: written in a row, they are read back alike."""
    special = set(tokenizer.all_special_ids)
    legal = []
    for token, i in sorted(tokenizer.get_vocab().items()):
        word = token.removesuffix("</w>")
        if word == token or i in special or not word.isalpha():
            continue
        if tokenizer(word).input_ids[1:-1] == [i]:
            legal.append(i)
    return legal


def generators(count, seed):
    """One generator per prompt."""
    return [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in range(count)]


def draw_integers(rngs, high, *shape):
    """Integers from 0 to below high: (N, *shape), on the CPU."""
    return torch.stack([torch.randint(high, shape, generator=rng) for rng in rngs])


def draw_chances(rngs, share, *shape):
    """True with that chance: (N, *shape) bool, on the CPU."""
    return torch.stack([torch.rand(shape, generator=rng) < share for rng in rngs])


def draw_normal(rngs, *shape):
    """Standard normal numbers: (N, *shape), on the CPU."""
    return torch.stack([torch.randn(shape, generator=rng) for rng in rngs])
