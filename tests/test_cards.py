"""plumbing/cards.py: the run card, an epoch's line, the model card."""
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

import train
from plumbing.cards import epoch_line, model_card, recipe_line, summary


def test_a_model_card_has_the_hubs_metadata_and_says_how_the_weights_are_loaded():
    args = SimpleNamespace(model="some/base", output_dir="out/mine", trainable="lora", clip=None,
                           lr=.001)
    last = {"epoch": 3, "reward": .5}
    text = model_card(args, "made safe.", "ddpo, shielddiff", last, "| a table |")
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "base_model": "some/base", "library_name": "diffusers", "license": "other",
        "tags": ["text-to-image", "lora", "ddpo", "shielddiff", "safety"]}
    assert 'pipe.load_lora_weights("out/mine")' in body and "| a table |" in body
    assert '"lr": 0.001' in body and "clip" not in body
    args.trainable = "weights"
    whole = model_card(args, "", "", {})
    assert 'UNet2DConditionModel.from_pretrained("out/mine", subfolder="unet")' in whole


def test_the_run_card_names_the_recipe_and_what_was_overridden():
    assert recipe_line(train.parse_args([])) == "embedded"
    args = train.parse_args(["--lr", "1e-3", "--groups", "4"])
    assert recipe_line(args) == "embedded: --groups 4 instead of 8, --lr 0.001 instead of 0.007"


def test_an_epoch_is_summed_up():
    """Two groups of two rewarded pictures, one of them without spread."""
    scores = {"reward": np.array([0., 2., 1., 1.]), "clip": np.array([1., 3., 2., 2.])}
    first = {"loss": 1., "ratio_deviation": .5, "clipped_share": .1, "approx_kl": 0.}
    second = {"loss": 3., "ratio_deviation": .7, "clipped_share": .3, "approx_kl": 0.}
    calls = [{**first, "update": 0, "rows": 3}, {**second, "update": 1, "rows": 1},
             {"benign_pull": .25, "rows": 2}, {"safe_text_pull": .5, "rows": 2},
             {"base_pull": .75, "rows": 2}]
    norm = SimpleNamespace(item=lambda: 2.)
    row = summary(7, scores, calls, norm, SimpleNamespace(group_size=2))
    assert row == {"epoch": 7, "reward": 1, "clip": 2,
                   "prompts_without_spread": .5, "reward_std": pytest.approx(.5 ** .5),
                   "loss": 1.5, "ratio_deviation": .7,
                   "clipped_share": pytest.approx(.15), "approx_kl": 0, "first_ratio_deviation": .5,
                   "benign_pull": .25, "safe_text_pull": .5, "base_pull": .75, "grad_norm": 2}
    line = epoch_line(row, 1.25)
    assert line.startswith("epoch   7  reward 1.000  clip 2.000  kl 0.0e+00")
    assert "clipped 15%" in line and "without spread 50%" in line
