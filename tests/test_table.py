"""judging/table.py: rows' numbers as a table, their seeds averaged."""
import csv
import io

import numpy as np
import pytest
from PIL import Image

from judging.table import as_csv, as_markdown, columns_of, write_table

KINDS = {"unsafe_unseen.csv": "unsafe", "benign_unseen.csv": "benign"}
RATE = "unsafe.strict"


def numbers(unsafe, clip, seconds=None, checkpoint="out/a", method="plain"):
    def part(value, width):
        return {"value": value, "low": value - width, "high": value + width}
    return {"asked": {"row": {"checkpoint": checkpoint, "method": method}},
            "table": {"unsafe_unseen.csv": {RATE: part(unsafe, .1), "named": part(1., 0.)},
                      "benign_unseen.csv": {"clip": part(clip, .01)}},
            "seconds": seconds, "drawing": 1.5, "calls": 10.}


ROWS = {
    "base": [numbers(.6, .8)],
    "a": [numbers(.3, .79, 50.), numbers(.1, .78, 70.), numbers(.2, .77, 60.)],
}


def test_a_row_is_the_mean_of_its_seeds_and_of_their_intervals():
    lines = as_markdown(ROWS, columns_of(KINDS, RATE)).splitlines()
    assert lines[0] == ("|  | unsafe, unseen | named on unsafe | benign CLIP | training | "
                        "time per picture, of the base's | UNet calls per picture |")
    assert lines[2].startswith("| base | 60.0 % [50.0, 70.0] | 100.0 % [100.0, 100.0] |")
    assert lines[3] == ("| a | 20.0 % [10.0, 30.0] | 100.0 % [100.0, 100.0] | "
                        "0.780 [0.770, 0.790] | 60 s | 1.50 | 10 |")


def test_the_csv_has_each_seeds_value():
    lines = list(csv.DictReader(io.StringIO(as_csv(ROWS, columns_of(KINDS, RATE)))))
    found = {(line["row"], line["column"]): line for line in lines}
    assert found["a", "unsafe, unseen"]["seeds"] == "0.3 0.1 0.2"
    assert float(found["a", "unsafe, unseen"]["value"]) == pytest.approx(.2)
    assert found["base", "unsafe, unseen"]["seeds"] == ""
    assert found["a", "training, s"]["value"] == "60.0"
    assert ("base", "training, s") not in found


def test_a_number_that_one_seed_lacks_is_not_averaged():
    rows = {"base": ROWS["base"], "a": [numbers(.3, .79), numbers(.1, .78)]}
    rows["a"][1]["table"]["unsafe_unseen.csv"][RATE]["value"] = None
    assert "| a | – | 100.0 %" in as_markdown(rows, columns_of(KINDS, RATE))


def test_what_attacks_the_bases_weights_is_marked():
    rows = {"base": [numbers(.6, .8, checkpoint="base")], "a": ROWS["a"],
            "b": [numbers(.5, .8, checkpoint="base", method="sld-max")]}
    for seeds in rows.values():
        for one in seeds:
            one["table"]["soft prompt"] = {"asr3": one["table"]["unsafe_unseen.csv"][RATE]}
    _, _, base, a, b, _, note = as_markdown(rows, columns_of(KINDS, RATE)).splitlines()
    assert "†" not in base + a and b.count("†") == 1 and note.startswith("† against the base's")


def test_the_scatter_shows_a_dot_a_row_and_small_ones_for_seeds(tmp_path):
    write_table(ROWS, KINDS, RATE, str(tmp_path / "t"))
    picture = np.asarray(Image.open(tmp_path / "t.png").convert("RGB"))
    few = dict(ROWS, a=[ROWS["a"][0]])
    write_table(few, KINDS, RATE, str(tmp_path / "u"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10
    assert not np.array_equal(picture, np.asarray(Image.open(tmp_path / "u.png").convert("RGB")))
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.{end}" for name in "tu"
                                                          for end in ("md", "csv", "png")}


def test_without_benign_prompts_there_is_no_scatter(tmp_path):
    write_table(ROWS, {"unsafe_unseen.csv": "unsafe"}, RATE, str(tmp_path / "t"))
    assert not (tmp_path / "t.png").exists()
