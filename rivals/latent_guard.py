"""Latent Guard (Liu et al., ECCV 2024, arXiv 2404.08031): block a prompt that comes near a concept.

On the frozen text encoder's states a cross-attention is learned, the concept asking and the
prompt's tokens answering, so that a prompt scores high with its own concept, low with others, and
low with what it says when the concept's name is swapped for a harmless one. A prompt whose best
score reaches the threshold is not drawn.

Trained in seconds, when a policy is first asked, on the model's guard_pairs (world.json): a CSV
with the columns concept, unsafe, safe. Ours: the threshold is where one in a hundred of the
training file's benign prompts would be blocked (theirs 9.01, on their data). An attack's text
states stand for the prompt's own, and their end is where its text ends.

Letters: n concepts, S = 1 + L states of D numbers: the end token's, then all.
"""
from collections import defaultdict
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from plumbing.options import UserError
from plumbing.tables import csv_rows, named, read_text
from prompts import read

HEADS, PER_HEAD, OUT = 16, 32, 128
EPOCHS, BATCH, LR = 1001, 64, 1e-3
FALSE_ALARMS = .01                      # of the benign training prompts
GUARDS = WeakKeyDictionary()            # policy -> {(epochs, lr, seed): its Guard}


class Guard(nn.Module):
    """score(prompts' states (B, S, D), concepts' end states (n, D)) -> (B, n)."""

    def __init__(self, width):
        super().__init__()
        self.key, self.value, self.query = (nn.Linear(width, HEADS * PER_HEAD) for _ in range(3))
        self.of_prompt, self.of_concept = (nn.Linear(HEADS * PER_HEAD, OUT) for _ in range(2))
        self.sharpness = nn.Parameter(torch.tensor(1 / .07))
        self.concepts, self.threshold = None, None      # set by train: (n, D), a number

    def forward(self, prompts, concepts):
        def heads(x):
            return x.unflatten(-1, (HEADS, PER_HEAD))
        key, value = heads(self.key(prompts)), heads(self.value(prompts))       # (B, S, h, d)
        query = self.query(concepts)                                            # (n, h d)
        attention = torch.einsum("nhd,bshd->bnhs", heads(query), key) / PER_HEAD ** .5
        answer = torch.einsum("bnhs,bshd->bnhd", attention.softmax(-1), value).flatten(2)
        v = F.normalize(self.of_prompt(answer), dim=-1)                         # (B, n, OUT)
        q = F.normalize(self.of_concept(query), dim=-1)                         # (n, OUT)
        return self.sharpness * (v * q).sum(-1)


def guard_loss(unsafe, safe):
    """The contrastive loss of scores (n, n): [i, j] of prompt i with concept j.

    Along a row prompt i is to find its concept, among the others and each safe prompt's best score;
    along a column concept j its prompt, among the others and all safe ones.
    """
    own = torch.arange(len(unsafe), device=unsafe.device)
    best = safe.max(1).values.expand(len(unsafe), -1)                           # (n, n)
    rows = F.cross_entropy(torch.cat([unsafe, best], 1), own)
    columns = F.cross_entropy(torch.cat([unsafe, safe]).T, own)
    return rows + columns


def latent_guard(policy, prompts, noise, draw, pictures, epochs=EPOCHS, lr=LR,
                 seed=0):
    """A blocker, which looks at prompts before anything is drawn."""
    if pictures is not None:
        return np.zeros(len(prompts), bool)
    guards = GUARDS.setdefault(policy, {})
    if (epochs, lr, seed) not in guards:
        guards[epochs, lr, seed] = train(policy, int(epochs), lr, int(seed))
    guard = guards[epochs, lr, seed]
    return (best_score(guard, policy, prompts) >= guard.threshold).cpu().numpy()


@torch.no_grad()
def best_score(guard, policy, prompts):
    """The highest of a prompt's scores with the guard's concepts, (B,)."""
    found = [guard(states_of(policy, prompts[k:k + 64]), guard.concepts).max(1).values
             for k in range(0, len(prompts), 64)]
    return torch.cat(found)


def states_of(policy, prompts):
    """The end token's state, then all: (B, 1 + L, D)."""
    states = policy.encode(prompts).float()                                     # (B, L, D)
    return torch.cat([end_states(policy, prompts, states)[:, None], states], 1)


def end_states(policy, prompts, states):
    """The states (B, D) of the texts' end tokens."""
    ids = policy.tokenizer([str(prompt) for prompt in prompts], truncation=True,
                           max_length=policy.text_length).input_ids
    last = torch.tensor([len(one) - 1 for one in ids], device=states.device)
    return states[torch.arange(len(states)), last]


# ---- training ------------------------------------------------------------------------------------

def train(policy, epochs=EPOCHS, lr=LR, seed=0):
    """The guard of a model's guard_pairs, with its concepts and its threshold."""
    pairs = read_guard_pairs(policy.world.guard_pairs)
    names = list(pairs)

    def all_states(texts):
        return states_of(policy, texts)
    by_concept = [[all_states(texts) for texts in zip(*pairs[name], strict=True)]
                  for name in names]                    # [(unsafe, safe)], each (pairs, S, D)
    concepts = end_states(policy, names, policy.encode(names).float())          # (n, D)
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        guard = Guard(concepts.shape[-1]).to(policy.device)
    optimizer = torch.optim.AdamW(guard.parameters(), lr=lr)
    for _ in range(epochs):
        order = rng.permutation(len(names))
        for start in range(0, len(names), BATCH):
            chosen = order[start:start + BATCH]
            picked = [rng.integers(len(by_concept[j][0])) for j in chosen]
            unsafe, safe = (torch.stack([by_concept[j][side][i]
                                         for j, i in zip(chosen, picked, strict=True)])
                            for side in (0, 1))         # (n, S, D) each
            own = concepts[torch.from_numpy(chosen).to(concepts.device)]
            loss = guard_loss(guard(unsafe, own), guard(safe, own))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    guard.concepts = concepts
    benign = [prompt for entry in policy.world.training_files[:1] if entry.benign
              for prompt in read(entry.benign)[0]]
    if not benign:
        raise UserError("--method: latent-guard needs benign prompts for its threshold; name a "
                        "training file and its benign one in world.json")
    scores = best_score(guard, policy, benign).sort(descending=True).values
    allowed = int(FALSE_ALARMS * len(scores))           # so many may reach it, the next may not
    guard.threshold = float(torch.nextafter(scores[allowed], torch.tensor(torch.inf)))
    return guard


def read_guard_pairs(path):
    """A CSV with the columns concept, unsafe, safe -> {concept: [(unsafe, safe)]}."""
    if not path:
        raise UserError("--method: latent-guard learns from pairs of prompts; name a CSV with the "
                        "columns concept, unsafe, safe as guard_pairs in the model's world.json")
    header, rows = csv_rows(read_text(path, "--method"), f"--method: {path}")
    columns = ("concept", "unsafe", "safe")
    if not set(columns) <= set(header):
        raise UserError(f"--method: {path} has the columns {named(header)}; concept, unsafe and "
                        "safe are needed")
    pairs = defaultdict(list)
    for _, row in rows:
        if all(row[column] for column in columns):
            pairs[row["concept"]].append((row["unsafe"], row["safe"]))
    if len(pairs) < 2:
        raise UserError(f"--method: {path} has {len(pairs)} concepts; two are needed to be told "
                        "apart")
    return pairs
