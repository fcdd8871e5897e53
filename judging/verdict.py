"""The verdict of a training: the base and the trained model on prompts kept from training."""
import json
import os
import sys
from argparse import Namespace

from tqdm import tqdm

from judging.compare import compare, no_pictures
from judging.report import rounded, to_markdown
from judging.rows import System, draw_row, open_file
from model import Policy
from plumbing.files import write
from prompts import category_in

VERDICT_PICTURES = 64                   # per held-out file


def judge_run(policy, judges, held_out, labels, args, card):
    """Write verdict.json and the model card, print the headline table: before and after.

    policy: the trained one; judges: judging.judges.Tools; held_out: prompt files, of which
    --category is taken where a file has it; labels: what counts as unsafe; args: train.py's;
    card: table -> README.md's text.
    """
    files = {}
    for path in held_out:
        category = category_in(path, args.category, "--held-out")
        file = open_file(path, pictures=VERDICT_PICTURES, category=category, option="--held-out")
        files[file.name] = file
    settings = Namespace(**{**vars(args), "eta": 1., "resolution": None})
    policies = {
        "before": Policy(args.model, (), policy.device, policy.dtype),
        "after": policy,
    }
    batches = sum(-(-len(file.prompts) // args.batch_size) for file in files.values())
    store, rows = {}, []                                # nothing is kept for later runs
    with tqdm(total=batches * len(policies), desc="verdict", leave=False) as bar:
        for name, drawn in policies.items():
            rows.append(draw_row(System(name=name), drawn, files, store, settings, policy.decode,
                                 bar.update))
    table, seen = compare(files, rows, judges, store, labels)
    headline = to_markdown(files, table, headline=True)
    verdict = json.dumps(rounded(table), indent=1)
    write(os.path.join(args.output_dir, "verdict.json"), verdict)
    write(os.path.join(args.output_dir, "README.md"), card(headline))
    print(headline)
    for sentence in no_pictures(files, seen):
        print(sentence, file=sys.stderr)
