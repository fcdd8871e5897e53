"""sample.py: one seed per picture, names of files, methods, and what is shown."""
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import rivals
import sample
from ddpo import denoise
from judging.pictures import read_manifest
from model import Policy, plain
from plumbing.options import UserError
from prompts import read
from reward import LABELS

ARGS = SimpleNamespace(steps=4, eta=1., guidance=2., batch_size=9, resolution=None)


def args_of(**changes):
    return SimpleNamespace(**{**vars(ARGS), **changes})


def test_picture_seventeen_is_the_same_in_any_batch(pipeline):
    policy, prompts, seeds = Policy(pipeline), ["a dog", "a cat", "a peach"] * 3, list(range(9))
    at_once = sample.generate(policy, prompts, seeds, ARGS)
    for size in (1, 4):
        pictures = sample.generate(policy, prompts, seeds, args_of(batch_size=size))
        assert np.abs(at_once.astype(int) - pictures).max() <= 1


def test_a_method_is_found_by_its_name_and_an_unknown_one_is_a_sentence():
    for name in rivals.methods():
        assert sample.choose_method(name).name == name
    with pytest.raises(UserError, match="--method: magic is unknown; give one of plain, negative"):
        sample.choose_method("magic")


def half_way(policy, prompts, noise, schedule, scale, start=0):
    """A sampler of another kind: it skips the first step."""
    predict = plain(policy, prompts, scale)
    return denoise(predict, noise, schedule, policy.prediction_type, start=start + 1)


def no_dogs(policy, prompts, noise, draw, pictures):
    """A blocker that reads the prompt before and looks at the picture after drawing."""
    if pictures is None:
        return ["dog" in prompt for prompt in prompts]
    redrawn = draw(prompts, noise)
    assert np.abs(redrawn.astype(int) - pictures).max() <= 1
    return ["cat" in prompt for prompt in prompts]


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(rivals.SAMPLERS, "half-way", f"{__name__}.half_way")
    monkeypatch.setitem(rivals.BLOCKERS, "no-dogs", f"{__name__}.no_dogs")


def test_a_sampler_and_a_blocker_are_registered_by_a_name(pipeline, registered):
    policy, texts = Policy(pipeline), ["a dog", "a cat", "a cup"]
    pictures = sample.generate(policy, texts, [1, 2, 3], ARGS)
    other = sample.choose_method("half-way")
    skipped, blocked = sample.generate_with_blocking(policy, other, texts, [1, 2, 3], ARGS)
    assert not blocked.any() and np.abs(skipped.astype(int) - pictures).max() > 1
    blocker = sample.choose_method("no-dogs")
    shown, blocked = sample.generate_with_blocking(policy, blocker, texts, [1, 2, 3],
                                               args_of(batch_size=2))
    assert blocked.tolist() == [True, True, False]
    assert not shown[:2].any() and np.abs(shown[2].astype(int) - pictures[2]).max() <= 1


# ---- the command ---------------------------------------------------------------------------------

class Fires:
    """A detector that sees nudity in every second picture."""

    def __init__(self, device):
        pass

    def __call__(self, pictures):
        scores = np.zeros((len(pictures), 18), np.float32)
        scores[::2, LABELS.index("BUTTOCKS_EXPOSED")] = .9
        return scores


def run(tmp_path, *options):
    folder = str(tmp_path / "pictures")
    sample.main(sample.parse_args([*options, "--output-dir", folder, "--steps", "2"]))
    names = sorted(name for name in os.listdir(folder) if name[0].isdigit())
    return [np.asarray(Image.open(os.path.join(folder, name))) for name in names]


def test_what_trips_is_pixelated_and_in_a_harmless_world_framed_in_the_grid(
        pipeline, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "Nudity", Fires)
    prompts = tmp_path / "p.txt"
    prompts.write_text("a dog\na cat\na naked child\n")
    options = ["--prompts", str(prompts), "--model", pipeline]
    bare = run(tmp_path, *options, "--no-censor")
    capsys.readouterr()
    veiled = run(tmp_path, *options)
    assert "refused 1 prompts" in (out := capsys.readouterr().out)
    assert "2 pictures" in out and "1 trip" in out and "are pixelated" in out
    assert len(np.unique(veiled[0].reshape(-1, 3), axis=0)) <= 64 and (veiled[1] == bare[1]).all()
    monkeypatch.setattr("model.read_world", lambda model: SimpleNamespace(
        harmless=True, concept="", clip=None))
    framed = run(tmp_path, *options)
    assert all((a == b).all() for a, b in zip(framed, bare, strict=True))
    sheet = np.asarray(Image.open(tmp_path / "pictures" / "grid.png"))
    assert (sheet[0, :64] == sample.censor(np.stack(bare), [1, 0], True)[0, 0]).all()
    assert "framed in grid.png" in capsys.readouterr().out


def test_prompts_may_be_given_in_place_or_by_the_option(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "Nudity", Fires)
    by_place = run(tmp_path, "a dog", "a cat", "--model", pipeline)
    by_option = run(tmp_path, "--prompts", "a dog", "a cat", "--model", pipeline)
    assert all((a == b).all() for a, b in zip(by_place, by_option, strict=True))


def test_a_checkpoint_is_named_with_its_method_and_words(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "Nudity", Fires)
    drawn = []
    monkeypatch.setattr(sample, "generate_with_blocking", lambda policy, method, prompts, *rest: (
        drawn.append((method.name, policy.concept)), (np.zeros((1, 64, 64, 3), np.uint8),
                                                      np.zeros(1, bool)))[1])
    common = ["a dog", "--model", pipeline, "--output-dir", str(tmp_path / "o")]
    for options in (["--checkpoint", "base+negative:red cars"], ["--method", "negative"],
                    ["--guide", "negative", "--concept", "cups"], []):
        sample.main(sample.parse_args([*common, *options]))
    assert drawn == [("negative", "red cars"), ("negative", "peach, egg"), ("negative", "cups"),
                     ("plain", "peach, egg")]


def test_an_earlier_commands_pictures_are_replaced_and_another_tools_refused(
        pipeline, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "Nudity", Fires)
    monkeypatch.setitem(rivals.BLOCKERS, "no-dogs", f"{__name__}.no_dogs")
    folder = tmp_path / "pictures"
    assert len(run(tmp_path, "a dog", "a cat", "a cup", "--model", pipeline)) == 3
    assert len(run(tmp_path, "a dog", "--model", pipeline, "--method", "no-dogs")) == 1
    assert read_manifest(str(folder)) == {"00000.png": {
        "prompt": "a dog", "seed": 0, "pixelated": True, "blocked": True}}
    run(tmp_path, "a dog", "a cat", "--model", pipeline, "--no-censor")
    assert not any(about["pixelated"] for about in read_manifest(str(folder)).values())
    (folder / "00007_1.png").write_bytes(b"theirs")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(sample, "Policy", None)         # whoever draws now fails
    with pytest.raises(UserError, match="holds 00007_1.png, which sample.py's samples.json does"):
        run(tmp_path, "a dog", "--model", pipeline)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_pictures_that_show_nothing_are_said(pipeline, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "Nudity", Fires)
    decode = Policy.decode

    def lose_one(policy, latents):
        latents[1] = float("nan")
        return decode(policy, latents)
    monkeypatch.setattr(Policy, "decode", lose_one)
    pictures = run(tmp_path, "a dog", "a cat", "a cup", "--model", pipeline, "--no-censor")
    assert not pictures[1].any() and pictures[0].any()
    assert "; 1 show nothing (flat, or not finite)" in capsys.readouterr().out


def test_the_detector_is_built_before_anything_is_drawn(pipeline, tmp_path, monkeypatch):
    def broken(device):
        raise UserError("the detector is torn")
    monkeypatch.setattr(sample, "Nudity", broken)
    monkeypatch.setattr(sample, "Policy", None)
    with pytest.raises(UserError, match="the detector is torn"):
        run(tmp_path, "a dog", "--model", pipeline)


def test_an_option_that_would_do_nothing_is_refused(pipeline, capsys):
    with pytest.raises(SystemExit):
        sample.parse_args(["a dog", "--concept", "cups"])
    assert "--concept: it would do nothing" in capsys.readouterr().err
    assert sample.parse_args(["a dog", "--concept", "cups", "--method", "negative"]).concept


@pytest.mark.parametrize("options", [
    ["--checkpoint", "base+negative:peach", "--concept", "egg"],
    ["--checkpoint", "base", "--concept", "egg"]])
def test_words_beside_a_methods_own_would_do_nothing(options, capsys):
    with pytest.raises(SystemExit):
        sample.parse_args(["a dog", *options])
    assert "--concept: it would do nothing" in capsys.readouterr().err


def test_what_is_in_the_way_is_said_before_anything_is_drawn(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "Nudity", Fires)
    run(tmp_path, "a dog", "--model", pipeline)
    monkeypatch.setattr(sample, "Policy", None)
    folder = tmp_path / "pictures"
    for name in ("grid.png", "00000.png"):
        (folder / name).unlink()
        (folder / name).mkdir()
        with pytest.raises(UserError, match=f"--output-dir: .*{name} is a folder"):
            run(tmp_path, "a dog", "--model", pipeline)
        (folder / name).rmdir()
    (folder / "samples.json").unlink()
    (folder / "grid.png").write_bytes(b"theirs")
    with pytest.raises(UserError, match="holds grid.png, which sample.py's samples.json does not"):
        run(tmp_path, "a dog", "--model", pipeline)


def test_words_that_are_cut_are_said(pipeline, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "Nudity", Fires)
    run(tmp_path, "a dog", "--model", pipeline, "--method", "negative", "--concept", "a cup " * 60)
    assert "--concept: 1 of 1 prompts are longer than the 24 tok" in capsys.readouterr().err


@pytest.mark.parametrize("options, sentence", [
    ([], "--prompts: none is given"),
    (["a dog", "--checkpoint", "base+plain:egg"], "--checkpoint: plain guidance steers away from"),
    (["a dog", "--method", "magic"], "--method: magic is unknown"),
    (["a dog", "--method", "negative", "--concept", "child"], "--concept: 'child' mentions minors"),
    (["a dog", "--checkpoint", "base+negative:child"], "'child' mentions minors"),
    (["a dog", "--checkpoint", "base+negative", "--method", "plain"], "leave one out"),
    (["a naked child"], "1 refused"),
    (["a dog", "--checkpoint", "nowhere"], "--checkpoint: nowhere has neither"),
    (["a dog", "--output-dir", "/proc/x"], "--output-dir: /proc/x can't be written"),
])
def test_a_mistake_is_one_sentence(pipeline, tmp_path, options, sentence):
    options = ["--model", pipeline, "--output-dir", str(tmp_path / "o"), *options]
    with pytest.raises(UserError, match=sentence):
        sample.main(sample.parse_args(options))


def test_eta_zero_draws_the_same_picture_from_the_same_start(pipeline):
    policy = Policy(pipeline)
    one = sample.generate(policy, ["a dog"], [1], args_of(eta=0.))
    schedule = policy.schedule(4, 0.)
    noise = torch.randn(1, 5, *policy.latent_shape(), generator=torch.Generator().manual_seed(1))
    latents = denoise(plain(policy, ["a dog"], 2.), noise, schedule)
    assert (policy.decode(latents).numpy() == one).all()


def test_the_committed_prompts_are_read():
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    assert len(read(f"{root}/data/unsafe_unseen.csv")[0]) == 60
