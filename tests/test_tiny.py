"""tiny.py: the world's grammar, and that its training goes on where it was cut."""
import os

import numpy as np
import pytest
import torch

import tiny
from prompts import UserError


def test_the_world_is_large_enough_and_split_without_overlap():
    assert len(tiny.NAMES) >= 60 and len(tiny.UNSEEN) == 512 and not set(tiny.SEEN) & set(tiny.UNSEEN)
    for axis, values in ((0, len(tiny.NAMES)), (1, 3), (2, 8)):
        assert {c[axis] for c in tiny.SEEN} == set(range(values))          # every word was seen, in other company
    assert len({tiny.caption(c) for c in tiny.COMBOS}) == len(tiny.COMBOS)


def test_every_word_is_one_token_and_other_text_still_has_tokens(tmp_path):
    tokenizer = tiny.make_tokenizer(str(tmp_path))
    words = {w for c in tiny.COMBOS for w in tiny.caption(c).split()}
    assert all(len(tokenizer.tokenize(w)) == 1 for w in words)
    assert tokenizer.unk_token_id not in tokenizer("Zürich, 1998!").input_ids[1:-1] and len(tokenizer("Zürich").input_ids) > 3


def test_captions_use_the_right_article():
    orange = tiny.NAMES.index("orange circle")
    assert tiny.caption((orange, 0, 0), False, False) == "an orange circle"
    assert tiny.caption((orange, 2, 6)) == "a large orange circle on a blue background"


@pytest.mark.skipif(not os.path.exists(tiny.FONT), reason="needs Debian's fonts-noto-color-emoji")
def test_drawings_are_a_function_of_the_seed_and_show_the_background():
    pictures, combos = tiny.draw_many(tiny.FONT, tiny.COMBOS[:48], 1, 0, "")
    again, _ = tiny.draw_many(tiny.FONT, tiny.COMBOS[:48], 1, 0, "")
    assert (pictures == again).all() and pictures.shape == (48, 64, 64, 3)
    for picture, (_, _, b) in zip(pictures, combos):
        assert np.abs(picture[0, 0] - np.array(list(tiny.BACKGROUNDS.values())[b])).max() <= 9


@pytest.mark.skipif(not os.path.exists(tiny.FONT), reason="needs Debian's fonts-noto-color-emoji")
def test_an_odd_drawing_has_a_hue_25_to_50_degrees_off():
    import colorsys
    tint = tiny.NAMES.index("brown circle"), 2, 0
    shade = lambda picture: colorsys.rgb_to_hsv(*picture[28:36, 28:36].reshape(-1, 3).mean(0) / 255)[0] * 360
    glyphs = tiny.load_glyphs(tiny.FONT)
    plain = [shade(tiny.draw(glyphs, tint, np.random.default_rng(s))) for s in range(20)]
    odd = [shade(tiny.draw(glyphs, tint, np.random.default_rng(s), 1.)) for s in range(20)]
    off = np.abs((np.array(odd) - np.mean(plain) + 180) % 360 - 180)
    assert np.ptp(plain) < 30 and off.min() > 18 and off.max() < 57


def test_a_training_that_was_cut_ends_where_the_uncut_one_does(tmp_path, monkeypatch):
    target = torch.randn(8, 3)

    def trained(folder, cut=None):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 3)

        def loss_fn(step, rng):
            if step == cut:
                raise KeyboardInterrupt
            return (model(torch.randn(8, 3, generator=rng)) - target).square().mean()
        os.makedirs(folder, exist_ok=True)
        return tiny.fit("test", model, loss_fn, 30, 1e-2, folder, "cpu", ema_decay=.9).weight

    monkeypatch.setattr(tiny.time, "time", iter(range(0, 10 ** 6, 50)).__next__)     # saves every second step
    whole = trained(str(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        trained(str(tmp_path / "cut"), 17)
    assert torch.equal(trained(str(tmp_path / "cut")), whole)


def test_few_steps_work_and_another_number_of_steps_than_a_training_was_begun_with_is_refused(tmp_path):
    model = torch.nn.Linear(3, 3)
    trained = lambda steps: tiny.fit("test", model, lambda step, rng: model(torch.randn(8, 3, generator=rng)).square().mean(), steps, 1e-2, str(tmp_path), "cpu")
    trained(20)
    with pytest.raises(UserError, match="begun with 20 steps, 21 are given"):
        trained(21)
    with pytest.raises(UserError, match="at least 3"):
        trained(2)


@pytest.mark.parametrize("options, said", [(["--font", "nowhere.ttf"], "nowhere.ttf can't be used"), (["--stage", "decoder"], "decoder needs .*/vae, which an earlier")])
def test_what_is_missing_is_said_before_anything_is_written(tmp_path, options, said):
    if "--font" not in options and not os.path.exists(tiny.FONT):
        pytest.skip("the font is not installed")
    with pytest.raises(UserError, match=said):
        tiny.main(tiny.parse_args([*options, "--out", str(tmp_path / "tiny"), "--work", str(tmp_path / "work")]))
    assert not os.listdir(tmp_path) or not os.listdir(tmp_path / "tiny")


@pytest.mark.skipif(not os.path.isdir("tiny/unet"), reason="the world is not built")
def test_the_committed_world_is_small_safetensors_that_stock_diffusers_draws_with():
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    files = [os.path.join(d, f) for d, _, names in os.walk("tiny") for f in names]
    assert sum(map(os.path.getsize, files)) < 30e6
    assert not [f for f in files if f.endswith((".bin", ".pt", ".ckpt", ".pkl"))]
    pipe = StableDiffusionPipeline.from_pretrained("tiny", safety_checker=None).to(torch.float32)
    assert isinstance(pipe.scheduler, DDIMScheduler)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a large lemon on a blue background", num_inference_steps=10, guidance_scale=2., output_type="np",
                   generator=torch.Generator().manual_seed(0)).images[0]
    assert np.abs(picture[:4].mean((0, 1)) * 255 - tiny.BACKGROUNDS["blue"]).max() < 40
