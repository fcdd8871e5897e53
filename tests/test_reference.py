"""results/reference.py: the page has each side's mean and range, and the figure is a picture."""
import json

import pytest
from PIL import Image

from results import reference


@pytest.fixture
def folder(tmp_path):
    """Rewards of two seeds of each side: ours .1 and .3 throughout, theirs .2 and .2."""
    for name, value in {"ours seed 0": .1, "ours seed 1": .3,
                        "theirs seed 0": .2, "theirs seed 1": .2}.items():
        (tmp_path / f"{name}.jsonl").write_text(f"{value}\n" * reference.EPOCHS)
    return str(tmp_path)


def test_the_page_has_each_sides_mean_and_range_in_every_window(folder):
    page = reference.as_markdown({"commit": "abc", "curves": reference.read_curves(folder)})
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == reference.EPOCHS // reference.WINDOW
    assert rows[0] == "| 1 to 10 | 20.0 (10.0 to 30.0) | 20.0 (20.0 to 20.0) |"
    assert "commit abc" in page


def test_the_figure_is_a_picture(folder, tmp_path):
    kept = json.loads(json.dumps({"curves": reference.read_curves(folder)}))
    reference.draw(kept, str(tmp_path / "curves.png"))
    assert Image.open(tmp_path / "curves.png").size == (500, 300)
