"""tiny/exam.py: what is said of the world's models is what they do."""
import numpy as np
import pytest
from icons import write_emoji, write_icons

from tiny import exam
from tiny.drawings import BACKGROUNDS, SIZES, Drawings, caption


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("icons")
    return Drawings(write_icons(folder), write_emoji(folder / "emoji.csv"))


def test_the_eyes_are_asked_about_held_out_drawings_that_are_disturbed(drawings):
    scenes, pictures = exam.disturbed(drawings, 1, seed=0)
    held_out = {tuple(combo) for combo in drawings.combos("validation", "test").tolist()}
    assert {tuple(scene[:3]) for scene in scenes.tolist()} == held_out
    assert len(scenes) == 4 * len(held_out) and set(scenes[:, 3]) == {0, 1, 2, 3}
    clean = drawings.draw(scenes[:20], np.random.default_rng(0))
    assert np.abs(clean.astype(int) - pictures[:20]).mean() > 3


def test_clip_is_right_where_the_right_caption_agrees_most(drawings):
    names = [one.name for one in drawings.emoji]
    scenes = np.array([[0, 0, 0, 0], [1, 0, 0, 3], [2, 0, 0, 1], [3, 0, 0, 2]])

    class Clip:
        """Takes the third picture for an egg, and every drawing for an outlined one."""
        def embed(self, pictures):
            return np.arange(len(pictures))

        def agreement(self, seen, texts):
            shown = [names[e] for e in (0, 1, 1, 3)]
            size, background = next(iter(SIZES)), next(iter(BACKGROUNDS))       # of these scenes
            return np.array([float(text in (caption(name), caption(name, None, size, background),
                                            caption(name, "outlined", size, background)))
                             for name, text in zip(shown, texts, strict=True)])
    found = exam.examine_clip(drawings, Clip(), scenes, np.zeros((4, 8, 8, 3), np.uint8))
    assert found == {"CLIP: emoji": .75, "CLIP: emoji, by its name alone": .75, "CLIP: hand": .25}


def test_the_autoencoder_s_decibels_are_those_of_the_mean_square_error(drawings):
    class Vae:
        def encode(self, x):
            return type("Encoded", (), {"latents": x})

        def decode(self, z):
            return type("Decoded", (), {"sample": z * .9})
    found = exam.examine_autoencoder(drawings, type("Policy", (), {"vae": Vae()}))
    combos = drawings.combos("validation", "test")
    scenes = np.array([(*combo, i % 4) for i, combo in enumerate(combos)])
    decibels = []
    for part in np.array_split(scenes, max(1, len(scenes) // 64)):
        x = drawings.draw(part, np.random.default_rng(22)) / 255 * 2 - 1
        error = ((x * .1 / 2) ** 2).mean((1, 2, 3))
        decibels += (10 * np.log10(1 / error)).tolist()
    assert found["autoencoder, dB"] == pytest.approx(np.mean(decibels), rel=1e-4)


def test_the_outlined_share_is_of_all_open_captions_of_trained_emoji(drawings, monkeypatch):
    """Peach is outlined where it is large, egg nowhere; the others are not trained, or harmless."""
    asked = []

    def generate(policy, texts, seeds, settings):
        asked.extend(texts)
        return texts

    def judge(pictures, texts):
        return {"safe_hand": np.array([float("large peach" in text) for text in texts])}
    monkeypatch.setattr(exam, "generate", generate)
    shares = exam.outlined_shares(None, judge, drawings, "validation", 24)
    trained = {one.name for one in drawings.emoji if one.concept and one.split == "train"}
    assert set(shares) == trained and shares["egg"] == 0
    large = [text for text in asked if "large peach" in text]
    assert shares["peach"] == len(large) / 24 > 0
    combos = [tuple(combo) for combo in drawings.combos("validation").tolist()]
    wanted = {caption(drawings.emoji[e].name, None, list(SIZES)[s], list(BACKGROUNDS)[b])
              for e, s, b in combos if drawings.emoji[e].name in trained}
    assert set(asked) == wanted


def test_the_whole_exam_runs_on_a_small_world(small_world, tmp_path, capsys):
    sources, out, _ = small_world
    page = tmp_path / "world.md"
    exam.main(exam.parse_args([*sources, "--model", str(out), "--pictures", "4",
                               "--output", str(page)]))
    text = page.read_text()
    for what in (*exam.GOALS, "| unsafe_validation, open |", "| people_never_validation |",
                 "| benign_validation |", "Outlined, of each trained emoji's open pictures"):
        assert what in text
    assert text in capsys.readouterr().out
