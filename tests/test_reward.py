"""reward.py against NudeNet's own detect and transformers' own processor."""
import numpy as np
import pytest
import torch

from prompts import Prompt, UserError
from reward import EXPOSED, LABELS, STRICT, ClipScore, Nudity, combine, load_reward, parse_labels, shield_reward


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


def test_scores_agree_with_nudenets_own_detect(nudity):
    import nudenet
    detector, boxes = nudenet.NudeDetector(), 0
    for size in (64, 96, 320):
        for background in ((60, 100, 200), (40, 160, 80), (240, 240, 240)):
            picture = peach(size, background)
            scores = nudity(picture[None])[0]
            for found in detector.detect(picture):
                assert scores[LABELS.index(found["class"])] == pytest.approx(found["score"], abs=1e-4)
                boxes += 1
    assert boxes > 0


def test_scores_do_not_depend_on_the_batch_and_pad_like_nudenet(nudity):
    wide = np.concatenate([peach(64), np.full((64, 32, 3), 200, np.uint8)], 1)
    assert np.allclose(nudity(np.stack([wide, wide]))[1], nudity(wide[None])[0], atol=1e-5)
    import nudenet
    square = np.zeros((96, 96, 3), np.uint8)
    square[:64] = wide
    assert np.allclose(nudity(square[None]), nudity(wide[None]), atol=1e-5)
    for found in nudenet.NudeDetector().detect(wide):
        assert nudity(wide[None])[0, LABELS.index(found["class"])] == pytest.approx(found["score"], abs=1e-4)


def test_boxes_are_those_of_nudenets_own_detect_batch_on_200_pictures(nudity):
    import nudenet
    rng, pictures = np.random.default_rng(0), []
    for _ in range(200):                                                    # peaches of any size, near and over each other, and noise
        colour = rng.integers(0, 256, 3)
        picture = np.full((96, 160, 3), colour, np.uint8)
        for _ in range(rng.integers(1, 4)):
            size = int(rng.integers(40, 90))
            top, left = rng.integers(0, 96 - size), rng.integers(0, 160 - size)
            picture[top:top + size, left:left + size] = peach(size, colour)
        pictures.append(picture)
    theirs = nudenet.NudeDetector().detect_batch(pictures, batch_size=8)
    scores, ours = nudity.detect(np.stack(pictures))
    assert sum(map(len, theirs)) > 100 and any(len(found) > 1 for found in theirs)
    assert [[(d["class"], d["box"]) for d in found] for found in ours] == [[(d["class"], d["box"]) for d in found] for found in theirs]
    assert np.allclose([d["score"] for found in ours for d in found], [d["score"] for found in theirs for d in found], atol=1e-6)
    assert np.array_equal(scores, nudity(np.stack(pictures)))


def test_file_order_scores_what_nudenet_sees_by_path(tmp_path, nudity):
    import nudenet
    from PIL import Image
    picture, path = peach(96)[..., ::-1].copy(), str(tmp_path / "p.png")    # skin-coloured once red and blue are swapped
    Image.fromarray(picture).save(path)
    scores, boxes = Nudity("file")(picture[None])[0], nudenet.NudeDetector().detect(path)
    assert boxes
    for found in boxes:
        assert scores[LABELS.index(found["class"])] == pytest.approx(found["score"], abs=1e-4)
    assert np.allclose(scores, nudity(picture[None, ..., ::-1])[0], atol=1e-6)


def test_labels_are_nudenets_in_its_order():
    import nudenet.nudenet as theirs
    assert LABELS == theirs.__dict__["__labels"] and len(STRICT) == 5


def test_label_sets_and_names_are_parsed():
    assert parse_labels("strict") == STRICT and parse_labels("exposed") == EXPOSED
    assert parse_labels("face_female, FACE_MALE") == ["FACE_FEMALE", "FACE_MALE"]
    with pytest.raises(UserError, match="KNEES"):
        parse_labels("KNEES")


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (50, 80), (440, 440), (97, 45)])
def test_clip_score_agrees_with_transformers_own_processor(pipeline, size):
    from PIL import Image
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer
    folder = f"{pipeline}/clip"
    pictures = np.random.default_rng(0).integers(0, 256, (3, *size, 3), dtype=np.uint8)
    pictures = np.stack([np.asarray(Image.fromarray(p).resize(size[::-1], Image.BICUBIC)) for p in pictures[:, ::4, ::4]])
    texts = ["a large peach", "a dog on a red background", ""]
    model, processor = CLIPModel.from_pretrained(folder), CLIPImageProcessor.from_pretrained(folder)
    tokens = CLIPTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    pixels = processor(images=[Image.fromarray(p) for p in pictures], return_tensors="pt").pixel_values
    with torch.no_grad():
        out = model(**tokens, pixel_values=pixels)
    theirs = (out.image_embeds * out.text_embeds).sum(-1).numpy()
    assert np.allclose(ClipScore(folder)(pictures, texts), theirs, atol=1e-3)


def test_the_combination_is_weighted_and_gated():
    clip, nudity = np.array([.5, .5]), np.array([.1, .6])
    assert combine(clip, nudity, 2, 3) == pytest.approx([.7, -.8])
    assert combine(clip, nudity, 2, 3, gate=.3) == pytest.approx([.7, -1.8])


def test_the_reward_returns_all_parts_and_asks_clip_about_the_safe_text(nudity):
    asked = []
    def clip(pictures, texts):
        asked.extend(texts)
        return np.full(len(pictures), .5)
    out = shield_reward(clip, nudity, STRICT)(peach(64)[None], [Prompt("a bare peach", safe_text="a peach")])
    assert asked == ["a peach"]
    assert {"reward", "clip", "nudity", "unsafe", "buttocks_exposed"} <= set(out)
    assert out["reward"] == pytest.approx(.5 - out["nudity"])
    assert out["nudity"] == max(out[label.lower()] for label in STRICT)


def test_a_reward_of_ones_own_is_loaded_from_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def redness(pictures, prompts):\n    return {'reward': pictures[..., 0].mean((1, 2))}\n")
    assert load_reward(f"{path}:redness")(np.ones((2, 4, 4, 3)), ["", ""])["reward"].tolist() == [1, 1]
    for wrong in (f"{path}:blueness", str(path), "nowhere.py:f"):
        with pytest.raises(UserError, match="--reward"):
            load_reward(wrong)
