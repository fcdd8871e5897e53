"""results/fine_tuning.py and concepts.py: what is measured, and their pages, without training."""
import glob
import json
import os

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from judging.pictures import read_picture
from model import Policy
from plumbing.worlds import read_world
from prompts import read
from results import concepts, fine_tuning
from reward import ClipScore


def weights_of(pipeline):
    (path,) = glob.glob(os.path.join(pipeline, "unet", "*.safetensors"))
    return load_file(path)


def test_a_loras_change_is_what_merging_it_adds(pipeline, tmp_path):
    policy = Policy(pipeline, trainable=True)
    trained = policy.make_trainable("lora", 2, "all")
    with torch.no_grad():
        for p in trained.values():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    policy.save(str(tmp_path), "card")
    base = weights_of(pipeline)
    changes = fine_tuning.change_of(str(tmp_path), base)
    policy.unet.fuse_lora()
    for layer, change in changes.items():
        merged = policy.unet.get_submodule(layer).base_layer.weight.detach().double()
        before = base[f"{layer}.weight"].double()
        assert torch.allclose(change.view_as(before), merged - before, atol=1e-4)
    assert len(changes) == len(trained) / 2


def test_weights_changes_are_their_differences(pipeline, tmp_path):
    base = weights_of(pipeline)
    other = {name: value + 1 for name, value in base.items()}
    os.makedirs(tmp_path / "unet")
    save_file(other, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    changes = fine_tuning.change_of(str(tmp_path), base)
    assert set(changes) == {name.removesuffix(".weight") for name in base if
                            name.endswith(".weight")}
    assert all(torch.allclose(change, torch.ones_like(change), atol=1e-5)
               for change in changes.values())


def test_the_cosine_is_of_all_layers_at_once():
    one = {"a": torch.tensor([1., 0.]), "b": torch.tensor([2.])}
    other = {"a": torch.tensor([1., 1.]), "c": torch.tensor([3.])}
    long = np.array([1, 0, 2, 0]), np.array([1, 1, 0, 3])
    by_hand = long[0] @ long[1] / np.linalg.norm(long[0]) / np.linalg.norm(long[1])
    assert fine_tuning.cosine(one, other) == pytest.approx(by_hand)


def test_the_probe_knows_the_tasks_pictures_and_not_others():
    world = read_world("tiny")
    prompts = read(os.path.join(ROOT, "data", "task_train.csv"))[0]
    pictures = np.stack([read_picture(prompt.image, "--prompts") for prompt in prompts])
    probe = fine_tuning.Probe(ClipScore(world.clip), prompts[:72])
    assert probe(pictures[:72], prompts[:72]) >= .99
    assert probe(pictures[72:], prompts[72:]) >= .7
    assert probe(np.zeros_like(pictures), prompts) <= .3


def numbers(unsafe, task):
    columns = dict.fromkeys(fine_tuning.COLUMNS, unsafe) | {"task": task}
    return {"name": "a", "variants": dict.fromkeys(fine_tuning.VARIANTS, columns),
            "cosine": {"sequential": -.1, "modular": .01},
            "curve": {"0": unsafe, "10": .5, "600": .6}}


def test_the_page_has_the_base_and_each_rows_variants(tmp_path):
    base = {"base": numbers(.6, .1)["variants"]["safe"],
            "base + task": numbers(.5, .9)["variants"]["safe"]}
    kept = {"a": [numbers(.0, .8), {**numbers(.1, .9), "curve": {}}]}
    lines = fine_tuning.table_of(kept, base).splitlines()
    assert lines[5] in fine_tuning.page_of(kept, base).splitlines()
    assert lines[2] == "| base | 60.0 | 60.0 | 10.0 | 60.0 | 60.0 |  |"
    assert lines[5].startswith("| a, sequential | 5.0 (0.0 to 10.0) |")
    assert "85.0 (80.0 to 90.0)" in lines[5] and lines[5].endswith("| -0.100 |")
    assert lines[4].endswith("|  |") and len(lines) == 8
    fine_tuning.draw(kept, base, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_what_is_kept_is_read_back(tmp_path):
    (tmp_path / "base.json").write_text(json.dumps({"base": {"base": {}}}))
    for seed in (0, 1):
        (tmp_path / f"a_{seed}.json").write_text(json.dumps({**numbers(.1, .9), "seed": seed}))
    kept, base = fine_tuning.read_kept(str(tmp_path))
    assert [one["seed"] for one in kept["a"]] == [0, 1] and base == {"base": {}}


def test_two_concepts_are_a_row_each_by_their_own_labels():
    def of(rate, value):
        metrics = {f"unsafe.{rate}": value, "named": 1., "hand": .9, "clip": .8}
        return {row: [metrics] for row in ("base", *concepts.ROWS)}
    kept = {"commit": "abc", "concepts": {
        "nudity": {"unsafe_unseen.csv": of("strict", .1), "benign_unseen.csv": of("strict", 0.)},
        "faces": {"people_unseen.csv": of("chosen", .2), "benign_unseen.csv": of("chosen", 0.)}}}
    page = concepts.page_of(kept)
    assert "| | nudity, unseen | faces, unseen | nudity: named right | faces: named" in page
    assert "| both LoRAs added | 10.0 | 20.0 | 100.0 | 100.0 | 100.0 | 90.0 | 80.0 |" in page
    assert concepts.name_of("both LoRAs added", 2) == "out/concepts/nudity_2+out/concepts/faces_2"
