"""tiny/build.py: the world's models, each trained for a few steps on a few drawings."""
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import DDIMScheduler, StableDiffusionPipeline
from icons import SHAPES, write_emoji, write_icons
from transformers import CLIPModel, ResNetForImageClassification

from plumbing.options import UserError
from plumbing.worlds import read_world
from tiny import build
from tiny.drawings import (
    BACKGROUNDS,
    HAND_OF,
    HANDS,
    SIZES,
    Drawings,
    caption,
    random_captions,
    read_emoji,
)

TINY = os.path.join(ROOT, "tiny")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The options that say where the drawings are."""
    folder = tmp_path_factory.mktemp("sources")
    return ["--icons", write_icons(folder), "--emoji", write_emoji(folder / "emoji.csv")]


@pytest.fixture(scope="module")
def drawings(sources):
    return Drawings(sources[1], sources[3])


# ---- the tokenizer -------------------------------------------------------------------------------

def test_every_word_is_one_token_and_other_text_still_has_tokens(tmp_path):
    emoji = read_emoji(os.path.join(TINY, "emoji.csv"))
    tokenizer = build.make_tokenizer(emoji, str(tmp_path))
    words = {word for one in emoji for hand in HANDS
             for word in caption(one.name, hand, "large", "purple").split()}
    assert all(len(tokenizer.tokenize(word)) == 1 for word in words)
    assert tokenizer.unk_token_id not in tokenizer("Zürich, 1998!").input_ids[1:-1]
    assert len(tokenizer("Zürich").input_ids) > 3


# ---- what CLIP learns from -----------------------------------------------------------------------

def test_a_caption_is_true_of_a_picture_if_all_that_it_says_holds_there():
    scenes = np.array([[0, 1, 2, 0], [0, 1, 2, 3], [0, 1, 5, 0], [1, 1, 2, 0], [0, 0, 2, 1]])
    says = np.array([[1, 1, 1], [0, 0, 0], [1, 0, 0], [1, 1, 1], [0, 0, 1]], bool)
    true = build.true_captions(scenes, says)
    assert true.tolist() == [[True, False, False, False, False],    # all of it
                             [True, True, True, False, True],       # the name alone
                             [True, True, True, False, False],      # the size
                             [False, False, False, True, False],
                             [False, False, False, False, True]]    # flat: no other drawer here
    scenes[2, 3] = 2                                    # flat has two drawers
    assert build.true_captions(scenes, says)[4].tolist() == [False, False, True, False, True]


def test_a_spoiled_picture_is_another_one_and_a_white_thing_has_no_wrong_hue(drawings):
    rng = np.random.default_rng(0)
    peach, other = [0, 1, 0, 0], [7, 2, 1, 0]
    plain = drawings.draw_one(peach, rng)
    for _ in range(12):
        picture, is_spoiled = build.spoil(drawings, plain, peach, other, rng)
        assert is_spoiled and picture.shape == plain.shape and picture.dtype == np.uint8
        assert np.abs(picture.astype(int) - plain).mean() > 1
    gray = list(SHAPES).index("1f9d1-200d-1f680")       # #dddddd has no hue to be wrong
    plain = drawings.draw_one([gray, 1, 1, 1], rng)
    kinds = [build.spoil(drawings, plain, [gray, 1, 1, 1], other, rng) for _ in range(20)]
    assert not all(is_spoiled for _, is_spoiled in kinds)
    assert all((picture == plain).all() for picture, is_spoiled in kinds if not is_spoiled)


@pytest.fixture(scope="module")
def clip(drawings, tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = build.make_tokenizer(drawings.emoji, str(tmp_path_factory.mktemp("tokenizer")))
    return build.new_clip(tokenizer), tokenizer


def test_both_towers_learn_from_a_batch(drawings, clip, monkeypatch):
    monkeypatch.setitem(build.BATCH, "clip", 16)
    model, tokenizer = clip
    loss = build.clip_loss(model, tokenizer, drawings, "cpu")(0, torch.Generator().manual_seed(0))
    loss.backward()
    assert torch.isfinite(loss)
    assert model.visual_projection.weight.grad.abs().sum() > 0
    assert model.text_model.embeddings.token_embedding.weight.grad.abs().sum() > 0


def test_every_caption_is_encoded_in_its_place(drawings, clip):
    model, tokenizer = clip
    captions = build.encode_captions(model, tokenizer, drawings.emoji, "cpu")
    assert captions.shape[:-1] == (len(drawings.emoji), 1 + len(SIZES), 1 + len(BACKGROUNDS),
                                   1 + len(HANDS))
    for place, text in (((0, 0, 0, 0), "a peach"), ((1, 3, 7, 3), "an outlined large egg on a blue "
                                                                  "background")):
        with torch.no_grad():
            alone = model.text_model(build.tokenize(tokenizer, [text])).pooler_output[0]
        assert torch.allclose(captions[place], alone, atol=1e-5)


def test_the_eyes_are_right_where_each_picture_is_nearest_its_own_caption(
        drawings, clip, monkeypatch):
    """A picture tower that knows the answer has a small loss, one that does not a large one."""
    monkeypatch.setitem(build.BATCH, "eyes", 24)
    facts = [(e, s, b, h) for e in range(len(SHAPES)) for s in range(4) for b in range(9)
             for h in range(4)]
    captions = torch.nn.functional.normalize(
        torch.randn(len(facts), 512, generator=torch.Generator().manual_seed(0)), dim=-1)
    captions = captions.view(len(SHAPES), 4, 9, 4, 512)
    asked = []

    class Model:
        logit_scale = torch.tensor(4.)
        text_projection = visual_projection = staticmethod(lambda x: x)

        def vision_model(self, x):
            return type("Seen", (), {"pooler_output": asked.pop()})
    rng = torch.Generator().manual_seed(3)
    chance = build.numpy_rng(torch.Generator().manual_seed(3))
    combos = drawings.combos("train")
    chosen = combos[chance.integers(len(combos), size=24)]
    drawers = chance.integers(4, size=24)
    hands = np.array(HAND_OF)[drawers]
    says = []

    def draw(scenes, chance):
        """The rest of the random numbers is as in eyes_loss, with nothing spoiled."""
        assert (scenes[:, :3] == chosen).all() and (scenes[:, 3] == drawers).all()
        peek = np.random.default_rng()
        peek.bit_generator.state = chance.bit_generator.state
        said = peek.random(3) < .5
        says.append(said)
        place = np.column_stack([chosen[:, 1], chosen[:, 2], hands])
        place = np.where(said, place + 1, 0)
        asked.append(captions[chosen[:, 0], place[:, 0], place[:, 1], place[:, 2]])
        return np.zeros((24, 64, 64, 3), np.uint8)
    monkeypatch.setattr(drawings, "draw", draw)
    loss_fn = build.eyes_loss(Model(), captions, drawings, "cpu", spoiled=0)
    assert loss_fn(0, rng) < .5                         # several pictures may be right for a text

    def draw_another(scenes, chance):
        draw(scenes, chance)
        asked.append(asked.pop().roll(1, 0))            # each picture shows its neighbour's thing
        return np.zeros((24, 64, 64, 3), np.uint8)
    monkeypatch.setattr(drawings, "draw", draw_another)
    assert loss_fn(0, torch.Generator().manual_seed(3)) > 5


def test_the_denoiser_sees_the_drawer_that_the_caption_asks_for(drawings, monkeypatch):
    combos = drawings.combos("train")
    latents = torch.zeros(len(combos), 4, build.PER_SCENE, 16, 8, 8)
    for d in range(4):
        latents[:, d] = d                               # a latent tells its drawer
    seen = []

    class Model:
        def __call__(self, x, t, states):
            seen.append((x, t))
            return type("Output", (), {"sample": torch.zeros_like(x)})
    texts_seen = []

    def states_of(texts):
        texts_seen.append(texts)
    monkeypatch.setitem(build.BATCH, "unet", 200)
    alphas = torch.ones(1000)                           # no noise: x is the latent
    build.unet_loss(Model(), drawings, latents, states_of, alphas, "cpu")(
        0, torch.Generator().manual_seed(1))
    t = seen[0][1]
    assert .35 < torch.isin(t, torch.tensor([1, 201, 401, 601, 801])).float().mean() < .6
    drawers = seen[0][0][:, 0, 0, 0].round().int().tolist()
    said = {"painted": {0}, "flat": {1, 2}, "outlined": {3}}
    blank = 0
    for text, drawer in zip(texts_seen[0], drawers, strict=True):
        blank += text == ""
        for hand, allowed in said.items():
            if hand in text:
                assert drawer in allowed
    assert 8 < blank < 40


# ---- training ------------------------------------------------------------------------------------

def test_a_training_that_was_cut_ends_where_the_uncut_one_does(tmp_path, monkeypatch):
    target = torch.randn(8, 3)
    monkeypatch.setitem(build.STEPS, "vae", 30)

    def trained(folder, cut=None):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 3)

        def loss_fn(step, rng):
            if step == cut:
                raise KeyboardInterrupt
            return (model(torch.randn(8, 3, generator=rng)) - target).square().mean()
        return build.fit("vae", model, loss_fn, 1e-2, folder, "cpu", ema_decay=.9).weight

    clock = iter(range(0, 10 ** 6, 50)).__next__        # a state is saved every second step
    monkeypatch.setattr(build.time, "time", clock)
    uncut = trained(str(tmp_path / "uncut"))
    with pytest.raises(KeyboardInterrupt):
        trained(str(tmp_path / "cut"), 17)
    assert torch.equal(trained(str(tmp_path / "cut")), uncut)


def test_few_steps_work_and_another_number_than_a_training_was_begun_with_is_refused(
        tmp_path, monkeypatch):
    model = torch.nn.Linear(3, 3)

    def loss_fn(step, rng):
        return model(torch.randn(8, 3, generator=rng)).square().mean()

    def train(steps):
        monkeypatch.setitem(build.STEPS, "vae", steps)
        build.fit("vae", model, loss_fn, 1e-2, str(tmp_path), "cpu")
    train(20)
    with pytest.raises(UserError, match="begun with 20 steps, 21 are given"):
        train(21)
    with pytest.raises(UserError, match="at least 3"):
        train(2)


SMALL = """
import sys
sys.path.insert(0, {root!r})
from tiny import build
build.STEPS = dict.fromkeys(build.STEPS, 40)
build.BATCH = dict.fromkeys(build.BATCH, 4)
clock = iter(range(0, 10 ** 6, 61)).__next__            # every step's state is saved
build.time.time = clock
build.main(build.parse_args(sys.argv[1:]))
"""


def test_a_stage_that_was_killed_ends_with_the_same_weights(tmp_path, sources):
    def command(name):
        folders = ["--out", str(tmp_path / name), "--work", str(tmp_path / f"{name}_work")]
        return [sys.executable, "-c", SMALL.format(root=ROOT), "--stage", "vae", *sources, *folders]
    subprocess.run(command("whole"), check=True, cwd=ROOT, capture_output=True)
    process = subprocess.Popen(command("killed"), cwd=ROOT, stderr=subprocess.DEVNULL)
    pointer = tmp_path / "killed_work" / "vae" / "latest.json"
    while not pointer.exists() and process.poll() is None:
        time.sleep(.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "vae").exists()   # it was killed before it was done
    subprocess.run(command("killed"), check=True, cwd=ROOT, capture_output=True)
    name = "vae/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_world_built_from_a_few_drawings_is_a_pipeline_with_its_files(small_world):
    _, out, work = small_world
    world = read_world(str(out))
    assert (world.recipe, world.concept, world.safe) == ("embedded", "painted, flat", "outlined")
    assert world.harmless
    assert CLIPModel.from_pretrained(world.clip) and os.path.isfile(world.concept_pairs)
    judge = ResNetForImageClassification.from_pretrained(world.judge)
    assert len(judge.config.id2label) == len(SHAPES) * len(HANDS)
    assert judge.config.id2label[2] == "peach, outlined"
    assert [os.path.basename(entry.prompts) for entry in world.training_files] == [
        "unsafe_train.csv", "people_train.csv"]
    for entry in world.training_files:
        for path in (entry.prompts, entry.benign, *entry.validation, *entry.held_out):
            assert os.path.realpath(path).startswith(os.path.realpath(out / "data"))
            assert os.path.isfile(path)
    for name in build.STEPS:
        assert (work / name / "latest.json").exists() and (work / f"{name}.png").exists()
    pipe = StableDiffusionPipeline.from_pretrained(out, safety_checker=None).to(torch.float32)
    assert isinstance(pipe.scheduler, DDIMScheduler) and pipe.vae.config.scaling_factor > 0


# ---- the command ---------------------------------------------------------------------------------

def test_a_world_elsewhere_has_its_prompt_files_inside(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    own = build.parse_args([])
    assert (own.out, own.data, own.emoji) == ("tiny", "data", "tiny/emoji.csv")
    assert build.parse_args(["--out", TINY]).data == "data"
    elsewhere = build.parse_args(["--out", "out/world"])
    assert elsewhere.data == "out/world/data"
    assert build.parse_args(["--out", "out/world", "--data", "x"]).data == "x"
    monkeypatch.chdir(tmp_path)
    assert os.path.realpath(build.parse_args([]).out) == os.path.realpath(TINY)


@pytest.mark.parametrize("stage, needed", [("eyes", "clip"), ("unet", "vae"), ("decoder", "vae"),
                                           ("data", "unet")])
def test_a_stage_whose_forerunner_is_missing_says_so_before_anything_is_written(
        tmp_path, sources, stage, needed):
    folders = ["--out", str(tmp_path / "tiny"), "--work", str(tmp_path / "work")]
    with pytest.raises(UserError, match=f"--stage: {stage} needs .*/{needed}, which an earlier"):
        build.main(build.parse_args(["--stage", stage, *sources, *folders]))
    assert not os.listdir(tmp_path)


# ---- the committed world -------------------------------------------------------------------------

def test_the_committed_world_is_small_safetensors_that_stock_diffusers_draws_with():
    files = [os.path.join(folder, name) for folder, _, names in os.walk(TINY) for name in names]
    assert sum(map(os.path.getsize, files)) < 30e6
    assert not [name for name in files if name.endswith((".bin", ".pt", ".ckpt", ".pkl"))]
    pipe = StableDiffusionPipeline.from_pretrained(TINY, safety_checker=None).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a flat large umbrella on a blue background", num_inference_steps=10,
                   guidance_scale=2., output_type="np",
                   generator=torch.Generator().manual_seed(0)).images[0]
    top = picture[:4].mean((0, 1)) * 255
    assert np.abs(top - BACKGROUNDS["blue"]).max() < 40


def test_the_committed_tokenizer_is_the_one_that_is_made(tmp_path):
    build.make_tokenizer(read_emoji(os.path.join(TINY, "emoji.csv")), str(tmp_path))
    with open(os.path.join(TINY, "tokenizer", "tokenizer.json")) as file:
        assert json.loads((tmp_path / "tokenizer.json").read_text()) == json.load(file)


def test_the_folder_s_own_files_are_those_that_are_committed(tmp_path):
    build.write_index(str(tmp_path))
    build.write_attribution(str(tmp_path))
    for name in ("model_index.json", "ATTRIBUTION"):
        with open(os.path.join(TINY, name)) as file:
            assert (tmp_path / name).read_text() == file.read()


def test_a_random_caption_of_the_committed_emoji_is_drawn_by_whom_it_says():
    emoji = read_emoji(os.path.join(TINY, "emoji.csv"))
    combos = np.tile([[one.name for one in emoji].index("parrot"), 1, 1], (400, 1))
    scenes, texts, _ = random_captions(emoji, combos, np.random.default_rng(0))
    flat = {scene[3] for scene, text in zip(scenes, texts, strict=True) if "flat" in text}
    assert flat == {1}                                  # of two flat drawers the one that trips
