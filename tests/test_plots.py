"""plumbing/plots.py: what may be shown, grids, curves."""
import io

import numpy as np
from PIL import Image

from plumbing.plots import RED, censor, frame, grid, pixelate, save_curve


def pictures(count=2):
    return np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)


def test_pixelation_flattens_what_is_flagged_and_nothing_else():
    shown = pixelate(pictures(), [True, False])
    assert (shown[1] == pictures()[1]).all() and (shown[0, :8, :8] == shown[0, 0, 0]).all()


def test_a_frame_is_red_and_leaves_the_picture_inside():
    shown = frame(pictures(), [False, True])
    assert (shown[0] == pictures()[0]).all()
    assert (shown[1, 2:-2, 2:-2] == pictures()[1, 2:-2, 2:-2]).all()
    assert (shown[1, 0] == RED).all() and (shown[1, :, -1] == RED).all()


def test_only_a_harmless_world_is_framed_instead_of_pixelated():
    flags = [True, False]
    assert (censor(pictures(), flags, harmless=True) == frame(pictures(), flags)).all()
    assert (censor(pictures(), flags, harmless=False) == pixelate(pictures(), flags)).all()


def test_a_grid_has_its_pictures_row_by_row():
    sheet = np.asarray(grid(pictures(3), columns=2, gap=2))
    assert sheet.shape == (64 * 2 + 2, 64 * 2 + 2, 3)
    assert (sheet[:64, 66:] == pictures(3)[1]).all() and (sheet[66:, :64] == pictures(3)[2]).all()
    assert (sheet[66:, 66:] == 255).all()


def test_a_curve_is_drawn_of_a_reward_with_parts_or_without(tmp_path):
    widths = []
    for names in (["reward"], ["reward", "clip", "nudity", "unsafe"]):
        metrics = []
        for epoch in (1, 2, 3):
            row = {name: epoch / 10 for name in names}
            metrics.append({"epoch": epoch, **row, "watched_benign_clip": .1})
        save_curve(str(tmp_path / "curve.png"), metrics)
        picture = Image.open(io.BytesIO((tmp_path / "curve.png").read_bytes()))
        widths.append(picture.width)
        assert len(picture.convert("L").getcolors(100000)) > 10
    assert widths[1] > 2 * widths[0]
