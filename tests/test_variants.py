"""results/variants.py: the table has each variant's mean and range, and the figure is a picture."""
import json

import pytest
from PIL import Image

from results import variants

ROWS = {"base": .6, "0.2 seed 0": .02, "0.2 seed 1": .04, "1 seed 0": .1}


@pytest.fixture
def evaluated(tmp_path):
    """A folder that evaluate.py wrote, of four rows."""
    table = {}
    for _, name, metric, _ in variants.COLUMNS:
        for row, value in ROWS.items():
            table.setdefault(name, {}).setdefault(row, {})[metric] = {"value": value}
    results = {"settings": {"commit": "abc"}, "table": table}
    (tmp_path / "results.json").write_text(json.dumps(results))
    return str(tmp_path)


def test_a_variant_has_the_mean_and_the_range_of_its_seeds(evaluated, tmp_path):
    variants.keep(evaluated, str(tmp_path / "kept.json"))
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert kept["rows"]["0.2 seed 1"]["benign CLIP, × 100"] == .04
    lines = variants.as_markdown("clip_weight", kept).splitlines()
    cells = {line.split(" | ")[0]: line.split(" | ")[1:3] for line in lines
             if line.startswith("| ")}
    assert cells["| base"] == ["", "60.0"]
    assert cells["| 0.2"] == ["2", "3.0 (2.0 to 4.0)"] and cells["| 1"] == ["", "10.0"]
    assert "commit abc" in lines[2] and "(clip_weight.png)" in lines[-1]


def test_the_figure_has_a_panel_for_each_column_that_it_shows(evaluated, tmp_path):
    variants.keep(evaluated, str(tmp_path / "kept.json"))
    variants.draw(json.loads((tmp_path / "kept.json").read_text()), str(tmp_path / "f.png"))
    assert Image.open(tmp_path / "f.png").size == (1200, 280)
