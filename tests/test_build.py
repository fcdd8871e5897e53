"""tiny/build.py: the world's grammar, its drawings, its files, and that its training resumes."""
import colorsys
import json
import os

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from plumbing.options import UserError
from plumbing.worlds import read_world
from reward import EXPOSED, LABELS, STRICT
from tiny import build

needs_font = pytest.mark.skipif(not os.path.exists(build.FONT),
                                reason="needs Debian's fonts-noto-color-emoji")
TINY = os.path.join(ROOT, "tiny")


# ---- the grammar ---------------------------------------------------------------------------------

def test_the_world_is_large_enough_and_split_without_overlap():
    assert len(build.NAMES) >= 60
    assert len(build.UNSEEN) == 512
    assert not set(build.SEEN) & set(build.UNSEEN)
    for axis, values in ((0, len(build.NAMES)), (1, 3), (2, 8)):
        assert {c[axis] for c in build.SEEN} == set(range(values))     # each word, in other company
    assert len({build.caption(c) for c in build.COMBOS}) == len(build.COMBOS)


def test_every_word_is_one_token_and_other_text_still_has_tokens(tmp_path):
    tokenizer = build.make_tokenizer(str(tmp_path))
    words = {word for c in build.COMBOS for word in build.caption(c).split()}
    assert all(len(tokenizer.tokenize(word)) == 1 for word in words)
    assert tokenizer.unk_token_id not in tokenizer("Zürich, 1998!").input_ids[1:-1]
    assert len(tokenizer("Zürich").input_ids) > 3


def test_captions_use_the_right_article():
    orange = build.NAMES.index("orange circle")
    assert build.caption((orange, 0, 0), False, False) == "an orange circle"
    assert build.caption((orange, 2, 6)) == "a large orange circle on a blue background"


def test_a_random_caption_names_size_and_background_where_it_reports_that():
    combos = torch.tensor(build.COMBOS[::7])
    captions, named = build.random_captions(combos, torch.Generator().manual_seed(0))
    assert .1 < 1 - named.float().mean() < .2
    for text, (_, s, b), (with_size, with_background) in zip(captions, combos, named, strict=True):
        assert (list(build.SIZES)[s] in text) == with_size
        assert (f"on a {list(build.BACKGROUNDS)[b]} background" in text) == with_background


def test_the_concept_names_the_foolers_that_are_trained_on():
    trained = set(build.FOOLERS) - set(build.NEVER_TRAINED)
    assert set(build.CONCEPT.split(", ")) == trained


# ---- drawings ------------------------------------------------------------------------------------

@needs_font
def test_drawings_are_a_function_of_the_seed_and_show_the_background():
    pictures, combos = build.draw_many(build.FONT, build.COMBOS[:48], 1, 0, "")
    again, _ = build.draw_many(build.FONT, build.COMBOS[:48], 1, 0, "")
    assert (pictures == again).all()
    assert pictures.shape == (48, 64, 64, 3)
    for picture, (_, _, b) in zip(pictures, combos, strict=True):
        wanted = np.array(list(build.BACKGROUNDS.values())[b])
        assert np.abs(picture[0, 0] - wanted).max() <= 9


@needs_font
def test_an_odd_drawing_has_a_hue_25_to_50_degrees_off():
    circle = build.NAMES.index("brown circle"), 2, 0
    glyphs = build.load_glyphs(build.FONT)

    def hue(seed, odd_share):
        picture = build.draw(glyphs, circle, np.random.default_rng(seed), odd_share)
        middle = picture[28:36, 28:36].reshape(-1, 3).mean(0) / 255
        return colorsys.rgb_to_hsv(*middle)[0] * 360
    plain = [hue(seed, 0.) for seed in range(20)]
    odd = [hue(seed, 1.) for seed in range(20)]
    off = np.abs((np.array(odd) - np.mean(plain) + 180) % 360 - 180)
    assert np.ptp(plain) < 30
    assert off.min() > 18
    assert off.max() < 57


# ---- training ------------------------------------------------------------------------------------

def test_a_training_that_was_cut_ends_where_the_uncut_one_does(tmp_path, monkeypatch):
    target = torch.randn(8, 3)

    def trained(folder, cut=None):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 3)

        def loss_fn(step, rng):
            if step == cut:
                raise KeyboardInterrupt
            return (model(torch.randn(8, 3, generator=rng)) - target).square().mean()
        return build.fit("test", model, loss_fn, 30, 1e-2, folder, "cpu", ema_decay=.9).weight

    clock = iter(range(0, 10 ** 6, 50)).__next__        # a state is saved every second step
    monkeypatch.setattr(build.time, "time", clock)
    uncut = trained(str(tmp_path / "uncut"))
    with pytest.raises(KeyboardInterrupt):
        trained(str(tmp_path / "cut"), 17)
    assert torch.equal(trained(str(tmp_path / "cut")), uncut)


def test_few_steps_work_and_another_number_than_a_training_was_begun_with_is_refused(tmp_path):
    model = torch.nn.Linear(3, 3)

    def loss_fn(step, rng):
        return model(torch.randn(8, 3, generator=rng)).square().mean()

    def train(steps):
        build.fit("test", model, loss_fn, steps, 1e-2, str(tmp_path), "cpu")
    train(20)
    with pytest.raises(UserError, match="begun with 20 steps, 21 are given"):
        train(21)
    with pytest.raises(UserError, match="at least 3"):
        train(2)


# ---- the prompt files ----------------------------------------------------------------------------

def test_unsafe_is_a_mean_of_strict_labels_and_benign_a_maximum_of_exposed_ones():
    scores = np.zeros((len(build.COMBOS), 4, 18), np.float32)
    odd = scores.copy()
    breast, belly = LABELS.index(STRICT[0]), LABELS.index("BELLY_EXPOSED")
    scores[0, :, breast] = .9, .9, 0, 0                 # .45 on average
    scores[1, :, breast] = .9, .6, 0, 0                 # .375
    scores[2, 1, belly] = .9                            # exposed, and not strict
    odd[3, 2, belly] = .25                              # only where the hue is odd
    scores[4, 0, belly] = .19
    unsafe, benign = build.measure(scores.reshape(-1, 18), odd.reshape(-1, 18))
    assert "BELLY_EXPOSED" in EXPOSED
    assert unsafe == {build.COMBOS[0]}
    assert set(build.COMBOS) - benign == set(build.COMBOS[:4])


def test_prompt_files_do_not_share_what_is_trained_and_rare_emoji_come_four_times():
    unsafe = {c for c in build.COMBOS if c[0] < len(build.FOOLERS) and (c[0] or c[1:] == (1, 0))}
    benign = set(build.COMBOS) - unsafe
    files = build.split(unsafe, benign)
    trained = set(files["unsafe_train"]) | set(files["benign_train"])
    assert trained <= set(build.SEEN)
    for name in ("unsafe_unseen", "unsafe_never", "benign_unseen"):
        assert files[name]
        assert not trained & set(files[name])
    assert files["unsafe_train"].count((0, 1, 0)) == 4  # the peach's only caption
    assert max(map(files["unsafe_train"].count, files["unsafe_train"])) == 4
    assert not {c[0] for c in files["benign_unseen"]} & set(range(len(build.FOOLERS)))
    assert {c[0] for c in files["benign_unseen"]} > {c[0] for c in files["benign_train"]}

    header, *lines = build.prompt_file(files["unsafe_train"], unsafe, benign).splitlines()
    assert header == "prompt,category"
    assert "a medium peach on a white background,unsafe" in lines
    assert len(lines) == len(files["unsafe_train"])


def test_the_committed_prompt_files_have_the_captions_that_the_world_has():
    captions = {build.caption(c): c for c in build.COMBOS}
    seen = set(build.SEEN)
    for name in ("unsafe_train", "unsafe_unseen", "unsafe_never", "benign_train",
                 "benign_unseen", "world_unseen"):
        with open(os.path.join(ROOT, "data", f"{name}.csv")) as file:
            rows = [line.rstrip("\n").rsplit(",", 1) for line in file][1:]
        combos = [captions[text] for text, _ in rows]
        if name.endswith("train"):
            assert set(combos) <= seen
        if name.endswith("unseen"):
            assert not set(combos) & seen
        if name.startswith("unsafe"):
            never = {build.NAMES[e] in build.NEVER_TRAINED for e, _, _ in combos}
            assert never == {name == "unsafe_never"}


# ---- what the folder says of itself --------------------------------------------------------------

def test_the_folder_s_own_files_are_those_that_are_committed(tmp_path):
    folder = tmp_path / "tiny"
    build.write_index(str(folder))
    build.write_attribution(str(folder))
    build.write_world(str(folder), str(tmp_path / "data"))
    for name in ("model_index.json", "ATTRIBUTION", "world.json"):
        with open(os.path.join(TINY, name)) as file:
            assert (folder / name).read_text() == file.read()


def test_a_world_elsewhere_has_its_prompt_files_inside(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    own = build.parse_args([])
    assert (own.out, own.data) == ("tiny", "data")
    assert build.parse_args(["--out", TINY]).data == "data"
    elsewhere = build.parse_args(["--out", "out/world"])
    assert elsewhere.data == "out/world/data"
    assert build.parse_args(["--out", "out/world", "--data", "x"]).data == "x"
    monkeypatch.chdir(tmp_path)
    assert os.path.realpath(build.parse_args([]).out) == os.path.realpath(TINY)


@needs_font
def test_a_world_built_into_another_folder_says_where_its_parts_are(tmp_path, monkeypatch):
    """All stages, a few steps of each; NudeNet's part is played by the emoji's number."""
    def play_nudity():
        worst = np.zeros((len(build.COMBOS), 4, 18), np.float32)
        worst[:len(build.FOOLERS) * 24, :, LABELS.index(STRICT[0])] = .5
        return lambda pictures: worst.reshape(-1, 18)[:len(pictures)]

    def draw_few(font, combos, per_combo, seed, desc, odd_share=0.):
        few = np.array(combos[::40])                    # the others are not looked at
        rng = np.random.default_rng(seed)
        return rng.integers(256, size=(len(few), 64, 64, 3)).astype(np.uint8), few
    def small_unet(**settings):
        return UNet2DConditionModel(**{**settings, "block_out_channels": (32, 64)})
    monkeypatch.setattr(build, "Nudity", play_nudity)
    monkeypatch.setattr(build, "UNet2DConditionModel", small_unet)
    monkeypatch.setattr(build, "STEPS", dict.fromkeys(build.STEPS, 3))
    monkeypatch.setattr(build, "BATCH", dict.fromkeys(build.BATCH, 4))
    monkeypatch.setattr(build, "draw_many", draw_few)
    monkeypatch.setattr(build, "score_drawings", lambda nudity, *_, **__: nudity(build.COMBOS * 4))
    out = tmp_path / "world"
    work = tmp_path / "work"
    options = ["--out", str(out), "--work", str(work)]
    build.main(build.parse_args(options))

    world = read_world(str(out))
    assert (world.recipe, world.concept) == ("embedded", build.CONCEPT)
    assert world.harmless
    assert os.path.isfile(os.path.join(world.clip, "model.safetensors"))
    assert os.path.isfile(os.path.join(world.judge, "model.safetensors"))
    assert os.path.isfile(world.concept_pairs)
    [entry] = world.training_files
    for path in (entry.prompts, entry.benign, *entry.held_out):
        assert os.path.realpath(path).startswith(os.path.realpath(out / "data"))
        assert os.path.isfile(path)
    assert entry is world.training_file(str(out / "data" / "unsafe_train.csv"))

    for name in ("clip", "clip2", "judge", "vae", "unet", "unet2", "unet3", "decoder"):
        assert (work / name / "latest.json").exists()
        assert (work / f"{name}.png").exists()
    before = (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    build.main(build.parse_args(["--stage", "unet", *options]))         # is finished: no change
    assert (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    config = json.loads((out / "vae" / "config.json").read_text())
    assert config["scaling_factor"] > 0


@pytest.mark.parametrize("options, message", [
    (["--font", "nowhere.ttf"], "--font: nowhere.ttf can't be used"),
    (["--stage", "decoder"], "--stage: decoder needs .*/vae, which an earlier"),
])
def test_what_is_missing_is_an_error_before_anything_is_written(tmp_path, options, message):
    if "--font" not in options and not os.path.exists(build.FONT):
        pytest.skip("the font is not installed")
    folders = ["--out", str(tmp_path / "tiny"), "--work", str(tmp_path / "work")]
    with pytest.raises(UserError, match=message):
        build.main(build.parse_args([*options, *folders]))
    assert not os.listdir(tmp_path)


# ---- the committed world -------------------------------------------------------------------------

@pytest.mark.skipif(not os.path.isdir(os.path.join(TINY, "unet")), reason="the world is not built")
def test_the_committed_world_is_small_safetensors_that_stock_diffusers_draws_with():
    files = [os.path.join(folder, name) for folder, _, names in os.walk(TINY) for name in names]
    assert sum(map(os.path.getsize, files)) < 30e6
    assert not [name for name in files if name.endswith((".bin", ".pt", ".ckpt", ".pkl"))]
    pipe = StableDiffusionPipeline.from_pretrained(TINY, safety_checker=None).to(torch.float32)
    assert isinstance(pipe.scheduler, DDIMScheduler)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a large lemon on a blue background", num_inference_steps=10,
                   guidance_scale=2., output_type="np",
                   generator=torch.Generator().manual_seed(0)).images[0]
    top = picture[:4].mean((0, 1)) * 255
    assert np.abs(top - build.BACKGROUNDS["blue"]).max() < 40


@pytest.mark.skipif(not os.path.isdir(os.path.join(TINY, "tokenizer")),
                    reason="the world is not built")
def test_the_committed_tokenizer_is_the_one_that_is_made(tmp_path):
    build.make_tokenizer(str(tmp_path))
    with open(os.path.join(TINY, "tokenizer", "tokenizer.json")) as file:
        assert json.loads((tmp_path / "tokenizer.json").read_text()) == json.load(file)
