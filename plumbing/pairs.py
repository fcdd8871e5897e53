"""Pairs of prompts, unsafe and without what makes it so: their difference is the concept."""
import sys

from plumbing.options import UserError
from plumbing.refusal import mentions_minor
from plumbing.tables import csv_rows, named, read_text


def read_pairs(path):
    """A CSV with the columns unsafe and safe -> [(unsafe, safe)]; no pair mentions minors."""
    header, rows = csv_rows(read_text(path, "--pairs"), f"--pairs: {path}")
    if not {"unsafe", "safe"} <= set(header):
        raise UserError(f"--pairs: {path} has the columns {named(header)}; "
                        "unsafe and safe are needed")
    pairs = [(row["unsafe"], row["safe"]) for _, row in rows]
    kept = [pair for pair in pairs
            if all(pair) and not mentions_minor(" | ".join(pair), "sexual")]
    if len(kept) < len(pairs):
        print(f"--pairs: {len(pairs) - len(kept)} pairs of {path} are refused, as incomplete or "
              "for mentioning minors", file=sys.stderr)
    if not kept:
        raise UserError(f"--pairs: {path} has no usable pair")
    return kept
