"""report.py: numbers as text, and the page."""
import re

import numpy as np
import pytest

from evaluate import as_file
from prompts import Prompt
from report import data_uri, rounded, shown, to_csv, to_html, to_markdown
from reward import LABELS, STRICT

part = {"value": .25, "low": .1, "high": .4}
TABLE = {"p.csv": {"base": {"unsafe.strict": part, "detections.strict": {"value": 7., "low": 3., "high": 9.}, "per_label": dict.fromkeys(LABELS, 2)},
                   "ours": {"unsafe.strict": {**part, "change": {"value": -.1, "low": -.2, "high": 0.}}, "per_label": dict.fromkeys(LABELS, 1),
                            "detections.strict": {"value": 1., "low": 0., "high": 2.}, "nrr.strict": {"value": .9, "low": None, "high": None}}}}
FILES = {"p.csv": as_file("p.csv", "unsafe", [Prompt("a <b>", seed=1, case=7), Prompt("c", seed=2, case=8)], 4, 0, 0)}


def test_every_rate_is_printed_with_its_interval():
    assert shown("unsafe.strict", part) == "25.0 % [10.0, 40.0]"
    assert shown("clip", {"value": .778, "low": .7, "high": .8}) == "0.778 [0.700, 0.800]"
    assert shown("nrr.strict", {"value": None, "low": None, "high": None}) == "–"
    text = to_markdown(FILES, TABLE)
    assert "| p.csv (unsafe; 4 pictures, 2 prompts) | base | ours |" in text
    assert "| NRR: boxes gone, strict | – | 90.0 % |" in text and "| boxes, strict | 7 [3, 9] | 1 [0, 2] |" in text
    assert "p.csv,ours,unsafe.strict,0.25,0.1,0.4,-0.1,-0.2,0.0" in to_csv(TABLE)


def test_numbers_are_rounded_all_through():
    assert rounded({"a": [np.float32(1 / 3), np.array([2 / 3])], 1: True}) == {"a": [pytest.approx(.333333), [.666667]], "1": True}


class Look:
    name, about = "base", {}

    def look(self, file, start):
        return np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)


def page(keep_unsafe):
    scores = np.zeros((4, 18), np.float32)
    scores[0, LABELS.index("BUTTOCKS_EXPOSED")] = .3
    results = {"table": {"p.csv": {"base": TABLE["p.csv"]["base"]}}, "opinions": ["1 < 2"], "rows": {"base": {}},
               "settings": {"detector": "d", "labels": {"strict": STRICT}, "steps": 5, "guidance": 2., "eta": 1., "commit": "c"}}
    return to_html(results, FILES, [Look()], {"p.csv": {"base": {"scores": scores}}}, STRICT, keep_unsafe)


def test_what_trips_the_detector_is_in_the_page_only_if_that_was_asked_for():
    unsafe, safe = (data_uri(picture) for picture in Look().look(None, 0)[:2])
    veiled, bare = page(False), page(True)
    assert unsafe not in veiled and safe in veiled and 'id="reveal" disabled' in veiled and 'class="bare"' not in veiled
    assert unsafe in bare and 'id="reveal">' in bare and "checked>" not in bare


def test_the_page_asks_nothing_of_the_network_and_escapes_what_it_shows():
    text = page(True)
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)[^"']*""", text) and "<script" not in text and "@import" not in text
    assert not re.findall(r"url\((?!#)", text)
    assert "a &lt;b&gt;" in text and "1 &lt; 2" in text and "case 7, seed 1" in text
