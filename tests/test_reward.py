"""reward.py against NudeNet's own detect and transformers' own processor."""
import nudenet
import nudenet.nudenet as nudenets_own
import numpy as np
import pytest
import torch
from PIL import Image

from plumbing.options import UserError
from prompts import Prompt
from reward import (
    EXPOSED,
    LABELS,
    STRICT,
    ClipScore,
    Nudity,
    combine,
    is_flagged,
    is_picture,
    parse_labels,
    shield_reward,
    worst_label,
)


@pytest.fixture(scope="module")
def nudity():
    return Nudity()


def peach(size, background=(60, 100, 200)):
    """A disc with a cleft, peach-coloured: what NudeNet takes for bare skin; needs no font."""
    y, x = np.mgrid[:size, :size] / size - .5
    picture = np.empty((size, size, 3), np.float32)
    picture[:] = background
    disc = x ** 2 + y ** 2 < .16
    shade = 1 - .8 * (x + .1) ** 2 - .5 * (y + .1) ** 2
    picture[disc] = (np.array([250, 165, 110]) * shade[..., None])[disc]
    picture[disc & (abs(x - .25 * y ** 2) < .02)] = (190, 90, 50)
    return picture.astype(np.uint8)


# ---- the detector --------------------------------------------------------------------------------

def test_scores_agree_with_nudenets_own_detect(nudity):
    detector, boxes = nudenet.NudeDetector(), 0
    for size in (64, 96, 320):
        for background in ((60, 100, 200), (40, 160, 80), (240, 240, 240)):
            picture = peach(size, background)
            scores = nudity(picture[None])[0]
            for box in detector.detect(picture):
                score = scores[LABELS.index(box["class"])]
                assert score == pytest.approx(box["score"], abs=1e-4)
                boxes += 1
    assert boxes > 0


def test_scores_do_not_depend_on_the_batch_and_pad_like_nudenet(nudity):
    wide = np.concatenate([peach(64), np.full((64, 32, 3), 200, np.uint8)], 1)
    alone = nudity(wide[None])
    assert np.allclose(nudity(np.stack([wide, wide]))[1], alone[0], atol=1e-5)
    square = np.zeros((96, 96, 3), np.uint8)
    square[:64] = wide
    assert np.allclose(nudity(square[None]), alone, atol=1e-5)
    for box in nudenet.NudeDetector().detect(wide):
        score = alone[0, LABELS.index(box["class"])]
        assert score == pytest.approx(box["score"], abs=1e-4)


def peaches_and_noise(rng):
    """A picture of one to three peaches of any size, near and over each other."""
    colour = rng.integers(0, 256, 3)
    picture = np.full((96, 160, 3), colour, np.uint8)
    for _ in range(rng.integers(1, 4)):
        size = int(rng.integers(40, 90))
        top, left = rng.integers(0, 96 - size), rng.integers(0, 160 - size)
        picture[top:top + size, left:left + size] = peach(size, colour)
    return picture


def test_boxes_are_those_of_nudenets_own_detect_batch_on_60_pictures(nudity):
    rng = np.random.default_rng(0)
    pictures = [peaches_and_noise(rng) for _ in range(60)]
    theirs = nudenet.NudeDetector().detect_batch(pictures, batch_size=8)
    scores, ours = nudity.detect(np.stack(pictures))
    assert sum(map(len, theirs)) > 30 and any(len(boxes) > 1 for boxes in theirs)

    def places(pictures):
        return [[(d["class"], d["box"]) for d in boxes] for boxes in pictures]

    def numbers(pictures):
        return [d["score"] for boxes in pictures for d in boxes]
    assert places(ours) == places(theirs)
    assert np.allclose(numbers(ours), numbers(theirs), atol=1e-6)
    assert np.array_equal(scores, nudity(np.stack(pictures)))


def test_file_order_scores_what_nudenet_sees_by_path(tmp_path, nudity):
    picture = peach(96)[..., ::-1].copy()               # skin-coloured once red and blue swap
    path = str(tmp_path / "p.png")
    Image.fromarray(picture).save(path)
    scores, boxes = Nudity("file")(picture[None])[0], nudenet.NudeDetector().detect(path)
    assert boxes
    for box in boxes:
        score = scores[LABELS.index(box["class"])]
        assert score == pytest.approx(box["score"], abs=1e-4)
    assert np.allclose(scores, nudity(picture[None, ..., ::-1])[0], atol=1e-6)


# ---- labels --------------------------------------------------------------------------------------

def test_labels_are_nudenets_in_its_order():
    assert LABELS == nudenets_own.__dict__["__labels"] and len(STRICT) == 5 and len(EXPOSED) == 9


def test_groups_and_labels_are_parsed_and_mixed():
    assert parse_labels("strict") == STRICT and parse_labels("exposed") == EXPOSED
    assert parse_labels("face_female, FACE_MALE") == ["FACE_FEMALE", "FACE_MALE"]
    assert parse_labels("strict,FACE_FEMALE") == [*STRICT, "FACE_FEMALE"]
    assert parse_labels("ANUS_EXPOSED, Strict, anus_exposed") == [
        "ANUS_EXPOSED", *(label for label in STRICT if label != "ANUS_EXPOSED")]
    for wrong in ("KNEES", "strict,KNEES", "", ","):
        with pytest.raises(UserError, match="--unsafe-labels: .* is no NudeNet label"):
            parse_labels(wrong)


def test_the_worst_label_counts_and_any_exposed_one_is_not_shown():
    scores = np.zeros((3, 18), np.float32)
    scores[0, LABELS.index("BUTTOCKS_EXPOSED")] = .9
    scores[1, LABELS.index("FACE_FEMALE")] = .9
    scores[2, LABELS.index("FEET_EXPOSED")] = .3
    assert worst_label(scores, STRICT).tolist() == pytest.approx([.9, 0, 0])
    assert is_flagged(scores).tolist() == [True, False, True]
    assert is_flagged(scores, ["FACE_FEMALE"]).tolist() == [True, True, True]


# ---- CLIP ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [(32, 32), (64, 64), (50, 80), (440, 440), (97, 45)])
def test_clip_score_agrees_with_transformers_own_processor(pipeline, size):
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer
    folder = f"{pipeline}/clip"
    noise = np.random.default_rng(0).integers(0, 256, (3, *size, 3), dtype=np.uint8)[:, ::4, ::4]
    pictures = [Image.fromarray(p).resize(size[::-1], Image.BICUBIC) for p in noise]
    texts = ["a large peach", "a dog on a red background", ""]
    processor = CLIPImageProcessor.from_pretrained(folder)
    tokens = CLIPTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    pixels = processor(images=pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        out = CLIPModel.from_pretrained(folder)(**tokens, pixel_values=pixels)
    theirs = (out.image_embeds * out.text_embeds).sum(-1).numpy()
    ours = ClipScore(folder)(np.stack([np.asarray(p) for p in pictures]), texts)
    assert np.allclose(ours, theirs, atol=1e-3)


def test_a_clip_that_is_not_there_is_a_sentence():
    with pytest.raises(UserError, match="--model: no/where is not available from the hub"):
        ClipScore("no/where")


# ---- the objective -------------------------------------------------------------------------------

def test_the_combination_is_weighted_and_gated():
    clip, nudity = np.array([.5, .5]), np.array([.1, .6])
    assert combine(clip, nudity, 2, 3) == pytest.approx([.7, -.8])
    assert combine(clip, nudity, 2, 3, gate=.3) == pytest.approx([.7, -1.8])


def test_only_the_ratio_of_the_weights_reaches_the_advantage():
    from ddpo import advantages
    rng = np.random.default_rng(0)
    clip, nudity, texts = rng.random(8), rng.random(8), list("aaaabbbb")
    one, other = (advantages(torch.from_numpy(combine(clip, nudity, *weights)), texts, scale=scale)
                  for weights, scale in (((.45, 1.), "batch"), ((.9, 2.), "batch")))
    assert torch.allclose(one, other, atol=1e-4)


def test_the_reward_returns_all_parts_and_asks_clip_about_the_safe_text(nudity):
    asked = []

    def clip(pictures, texts):
        asked.extend(texts)
        return np.full(len(pictures), .5)
    reward = shield_reward(clip, nudity, STRICT, clip_weight=.4)
    out = reward(peach(64)[None], [Prompt("a bare peach", safe_text="a peach")])
    assert asked == ["a peach"]
    assert {"reward", "clip", "nudity", "unsafe", "buttocks_exposed"} <= set(out)
    assert out["reward"] == pytest.approx(.4 * .5 - out["nudity"])
    assert out["nudity"] == max(out[label.lower()] for label in STRICT)


# ---- pictures that show nothing ------------------------------------------------------------------

def pictures_of_kinds():
    """Black, a flat red, faint noise; a small thing on white, a gradient, noise."""
    rng = np.random.default_rng(0)
    flat = np.zeros((3, 64, 64, 3), np.uint8)
    flat[1] = (200, 10, 10)
    flat[2] = rng.integers(100, 104, flat[2].shape)
    shown = np.full((3, 64, 64, 3), 255, np.uint8)
    shown[0, 30:34, 30:34] = (230, 120, 90)
    shown[1] = np.linspace(0, 20, 64)[:, None, None]
    shown[2] = rng.integers(0, 256, flat[2].shape)
    return np.concatenate([flat, shown])


def test_a_flat_picture_of_any_colour_is_none_and_a_small_emoji_on_white_is_one():
    rng = np.random.default_rng(0)
    for colour in ((0, 0, 0), (255, 255, 255), (255, 0, 0), (12, 200, 90)):
        flat = np.full((1, 64, 64, 3), colour, np.uint8)
        assert not is_picture(flat).any()
        noisy = np.clip(flat + rng.integers(-1, 2, flat.shape), 0, 255).astype(np.uint8)
        assert not is_picture(noisy).any()
    emoji = np.full((2, 512, 512, 3), 255, np.uint8)
    emoji[0, 250:266, 250:266] = 250, 200, 60           # 16 of 512 pixels a side
    assert is_picture(emoji).tolist() == [True, False]
    gradient = np.linspace(100, 108, 64).round().astype(np.uint8)[None, :, None, None]
    assert is_picture(np.broadcast_to(gradient, (1, 64, 64, 3))).all()      # a sky
    only_blue = np.zeros((1, 64, 64, 3), np.uint8)
    only_blue[:, ::2, :, 2] = 40
    assert is_picture(only_blue).all()
    assert is_picture(np.zeros((0, 64, 64, 3), np.uint8)).shape == (0,)


def test_a_picture_that_shows_nothing_is_no_safe_one():
    def clip(pictures, texts):
        return np.full(len(pictures), .5, np.float32)
    pictures = pictures_of_kinds()
    def nudity(pictures):
        return np.zeros((len(pictures), len(LABELS)), np.float32)
    found = shield_reward(clip, nudity, STRICT)(pictures, ["a"] * 6)
    assert found["no_picture"].tolist() == [1, 1, 1, 0, 0, 0] and not found["unsafe"].any()
    assert found["reward"].tolist() == [-.5, -.5, -.5, .5, .5, .5]
