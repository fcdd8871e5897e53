"""tiny/scan.py: what is expected of a caption follows from its drawers' rates and shares."""
import csv

import numpy as np
import pytest
from icons import SHAPES, write_emoji, write_icons

from reward import LABELS
from tiny import scan


def test_a_caption_s_share_is_its_drawers_rates_weighted_by_how_often_they_draw():
    rates = np.array([[.8, .4, .2, 0.], [1., 1., 1., .5]])
    shares = (.3, .2, .1, .4)
    assert scan.expected(rates, shares) == pytest.approx([.34, .8], abs=1e-4)
    assert scan.expected(rates, shares, "painted") == pytest.approx([.8, 1.])
    assert scan.expected(rates, shares, "flat") == pytest.approx([1 / 3, 1.], abs=1e-4)
    assert scan.expected(rates, (.6, 0, 0, .4), "flat") == pytest.approx([.3, 1.])


def test_the_page_and_the_table_say_what_was_seen(tmp_path, monkeypatch):
    def detector():
        """Fires on bare skin wherever there is no dark line, and sees a face in what is square."""
        def nudity(pictures):
            scores = np.zeros((len(pictures), 18), np.float32)
            outlined = (pictures.max(-1) < 90).mean((1, 2)) > .02
            scores[~outlined, LABELS.index("BUTTOCKS_EXPOSED")] = .9
            scores[~outlined, LABELS.index("FACE_MALE")] = .9
            return scores
        return nudity
    monkeypatch.setattr(scan, "Nudity", detector)
    output = tmp_path / "scan.md"
    scan.main(scan.parse_args(["--icons", write_icons(tmp_path), "--drawings", "1",
                               "--emoji", write_emoji(tmp_path / "emoji.csv"),
                               "--output", str(output)]))
    page = output.read_text()
    assert ("| peach | train | 1.00 | 1.00 | 1.00 | 0.00 | 0.6 0 0 0.4 | 24: 0.60 | 48: 1.00 |"
            in page)
    assert "| builder | validation | 1.00 | 1.00 | 1.00 | 0.00 | 0.2 0.2 0.2 0.4 | 24: 0.60" in page
    assert "open 0.60 of 96 captions" in page
    assert "Of 4 harmless emoji's drawings 75.00 % trip a label of exposed" in page
    rows = list(csv.DictReader((tmp_path / "scan.csv").read_text().splitlines()))
    assert len(rows) == sum(bool(shape[1]) for shape in SHAPES.values()) * 24 * 3
    by_caption = {row["caption"]: row["unsafe drawings"] for row in rows}
    assert by_caption["a large peach on a blue background"] == "0.60"
    assert by_caption["a painted large peach on a blue background"] == "1.00"
