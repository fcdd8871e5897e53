"""judging/report.py: numbers as text, and the page."""
import json
import re

import numpy as np
import pytest

from judging.report import (
    data_uri,
    metrics_of,
    picture_table,
    rounded,
    shown,
    to_csv,
    to_html,
    to_markdown,
    trade_off,
)
from judging.rows import Row, as_file
from plumbing.plots import RED, frame, pixelate
from prompts import Prompt
from reward import LABELS, STRICT

PART = {"value": .25, "low": .1, "high": .4}
TABLE = {"p.csv": {
    "base": {
        "unsafe.strict": PART,
        "detections.strict": {"value": 7., "low": 3., "high": 9.},
        "per_label": dict.fromkeys(LABELS, 2),
    },
    "ours": {
        "unsafe.strict": {**PART, "change": {"value": -.1, "low": -.2, "high": 0.}},
        "per_label": dict.fromkeys(LABELS, 1),
        "detections.strict": {"value": 1., "low": 0., "high": 2.},
        "nrr.strict": {"value": .9, "low": None, "high": None},
        "blocked": PART,
    },
}}
PROMPTS = [Prompt("a <b>", seed=1, case=7), Prompt("c", seed=2, case=8)]
FILES = {"p.csv": as_file("p.csv", "unsafe", PROMPTS, 4)}


def test_every_rate_is_printed_with_its_interval():
    assert shown("unsafe.strict", PART) == "25.0 % [10.0, 40.0]"
    assert shown("clip", {"value": .778, "low": .7, "high": .8}) == "0.778 [0.700, 0.800]"
    assert shown("fid.base", {"value": 12.34, "low": None, "high": None}) == "12.3"
    assert shown("nrr.strict", {"value": None, "low": None, "high": None}) == "–"
    text = to_markdown(FILES, TABLE)
    assert "| p.csv (unsafe; 4 pictures, 2 prompts) | base | ours |\n|---|---|---|\n" in text
    assert "| NRR: boxes gone, strict | – | 90.0 % |" in text
    assert "| boxes, strict | 7 [3, 9] | 1 [0, 2] |" in text
    assert "| blocked | – | 25.0 % [10.0, 40.0] |" in text
    assert "p.csv,ours,unsafe.strict,0.25,0.1,0.4,-0.1,-0.2,0.0" in to_csv(TABLE)
    assert "p.csv,base,unsafe.strict,0.25,0.1,0.4,,," in to_csv(TABLE)


def test_the_headline_leaves_out_the_second_label_set_and_what_only_the_files_have():
    metrics = ["unsafe.strict", "unsafe.nine", "detected.strict", "clip", "cmmd.base", "blocked"]
    rows = {"base": dict.fromkeys(metrics, PART)}
    assert metrics_of(rows, headline=True) == ["unsafe.strict", "blocked", "clip", "cmmd.base"]
    assert metrics_of(rows) == ["unsafe.strict", "unsafe.nine", "detected.strict", "blocked",
                                "clip", "cmmd.base"]


def test_numbers_are_rounded_throughout():
    thing = {"a": [np.float32(1 / 3), np.array([2 / 3])], 1: True}
    assert rounded(thing) == {"a": [pytest.approx(.333333), [.666667]], "1": True}


# ---- the page ------------------------------------------------------------------------------------

def look(file, start):
    return np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)


def page(keep_unsafe=False, harmless=False, about=None, **more):
    """The page of one row, of whose two prompts the first trips the detector."""
    scores = np.zeros((4, 18), np.float32)
    scores[0, LABELS.index("BUTTOCKS_EXPOSED")] = .3
    results = {
        "table": {"p.csv": {"base": TABLE["p.csv"]["base"]}},
        "opinions": ["1 < 2"],
        "rows": {"base": {}},
        "settings": {"detector": "d", "labels": {"strict": STRICT}, "steps": 5, "guidance": 2.,
                     "eta": 1., "commit": "c"},
    }
    seen = {"p.csv": {"base": {"scores": scores, "no_picture": np.zeros(4, bool), **more}}}
    rows = [Row("base", look, about or {})]
    return to_html(results, FILES, rows, seen, STRICT, harmless, keep_unsafe)


def test_of_each_prompt_the_first_picture_is_shown():
    prompts = [Prompt(text, case=i) for i, text in enumerate("aaba")]
    file = as_file("p.csv", "unsafe", prompts)
    cell = {"scores": np.zeros((4, 18), np.float32), "no_picture": np.zeros(4, bool)}
    text = picture_table(file, [Row("base", look, {})], {"base": cell}, STRICT, False, False)
    assert text.count("<img") == 2 and "case 0," in text and "case 2," in text
    assert data_uri(look(None, 0)[2]) in text and data_uri(look(None, 0)[1]) not in text


def test_a_model_that_drew_nothing_has_no_point_in_the_plot():
    none = {"value": None, "low": None, "high": None}
    files = {"u": as_file("u", "unsafe", PROMPTS), "b": as_file("b", "benign", PROMPTS)}
    table = {name: {"base": {"unsafe.strict": PART, "clip": PART},
                    "blank": {"unsafe.strict": none, "clip": PART}} for name in files}
    svg, _ = trade_off(files, table)
    assert "base" in svg
    assert "| – |" in to_markdown(files, {"u": table["u"]})


def test_what_trips_the_detector_is_in_the_page_only_if_that_was_asked_for():
    unsafe, safe = (data_uri(picture) for picture in look(None, 0)[:2])
    pixelated = data_uri(pixelate(look(None, 0), [True])[0])
    veiled, bare = page(keep_unsafe=False), page(keep_unsafe=True)
    assert unsafe not in veiled and safe in veiled and pixelated in veiled
    assert 'id="reveal" disabled' in veiled and 'class="bare"' not in veiled
    assert unsafe in bare and pixelated in bare
    assert 'id="reveal">' in bare and "checked>" not in bare
    assert 'alt="base, pixelated: the detector fires 0"' in veiled
    assert 'alt="base, picture 1"' in veiled and 'alt="base, revealed 0"' in bare


def test_in_a_harmless_world_it_is_framed_in_red_and_not_pixelated():
    pictures = look(None, 0)
    framed = frame(pictures, [True, False, False, False])[0]
    assert (framed[0] == RED).all() and np.array_equal(framed[2:-2, 2:-2],
                                                       pictures[0, 2:-2, 2:-2])
    text = page(harmless=True)
    assert data_uri(framed) in text and data_uri(pixelate(pictures, [True])[0]) not in text
    assert 'alt="base, framed: the detector fires 0"' in text and "pixelated:" not in text
    assert 'id="reveal"' not in text and "red frame" in text


def test_another_tools_pictures_are_pixelated_in_a_harmless_world_too():
    text = page(harmless=True, about={"images": "theirs"})
    assert 'alt="base, pixelated: the detector fires 0"' in text and "framed:" not in text
    assert data_uri(look(None, 0)[0]) not in text


def test_a_blocked_picture_is_named_so():
    text = page(blocked=np.array([False, True, False, False]))
    assert 'alt="base, blocked 1"' in text and 'alt="base, picture' not in text
    text = page(no_picture=np.array([False, True, False, False]))
    assert 'alt="base, no picture 1"' in text and 'alt="base, picture' not in text


def test_the_page_asks_nothing_of_the_network_and_escapes_what_it_shows():
    text = page(keep_unsafe=True)
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)[^"']*""", text)
    assert "<script" not in text and "@import" not in text
    assert not re.findall(r"url\((?!#)", text)
    assert "a &lt;b&gt;" in text and "1 &lt; 2" in text and "case 7, seed 1" in text


def test_a_runs_own_reward_curve_is_drawn(tmp_path):
    lines = [json.dumps({"epoch": epoch, "reward": .1 * epoch}) for epoch in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    caption = "Reward of the pictures each epoch was trained on."
    assert caption in page(about={"checkpoint": str(tmp_path)})
    for other in ('{"step": 1, "loss": 2}', lines[0] + '\n{"epo', "", "[]"):     # erase.py's, torn
        (tmp_path / "metrics.jsonl").write_text(other)
        assert caption not in page(about={"checkpoint": str(tmp_path)})
    assert caption not in page(about={"checkpoint": None})
