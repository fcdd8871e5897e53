"""rivals.py: the table's rows, without training anything."""
import json

import pytest

import rivals
from prompts import UserError

part = lambda value: {"value": value, "low": None, "high": None}


@pytest.fixture
def asked(monkeypatch):
    """What rivals.py asks of the other programs; every rate of a row is its number of letters, in percent."""
    said = []
    monkeypatch.setattr(rivals, "command", lambda *words: said.append(words) or 7.)
    monkeypatch.setattr(rivals, "seconds_a_picture", lambda folder, checkpoint, guide: .002)

    def measure(folder, rows, pictures, *files):
        names = [word.rsplit("/")[-1] for word in files if word.endswith(".csv")]
        metrics = ("unsafe.strict", "asr1", "asr3", "named", "clip", "clip_distance")
        return {name: {row: {m: part(len(row) / 100) for m in metrics} for row in rows} for name in names}
    monkeypatch.setattr(rivals, "measure", measure)
    return said


def test_a_row_alone_makes_only_what_it_needs_and_makes_it_once(asked, tmp_path):
    args = rivals.parse_args(["--rows", "ESD-x", "SLD medium", "--output-dir", str(tmp_path)])
    rivals.main(args)
    made = [words[:2] for words in asked]
    assert made == [("erase.py", "esd-x"), ("attack.py", "ring-a-bell"), ("attack.py", "soft-prompt"), ("attack.py", "soft-prompt")]
    assert [words for words in asked if "--checkpoint" in words][0][-1].endswith("esd-x")
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| base", "| ESD-x", "| SLD medium"]
    assert "| ESD-x | 5.0 % | 5.0 %" in lines[3] and lines[3].endswith("| 2 | 7 s |") and lines[4].endswith("| 2 | – |")
    assert json.loads((tmp_path / "seconds.json").read_text()) == {"esd-x": 7.}
    asked.clear()
    rivals.main(args)
    assert [words[0] for words in asked] == ["attack.py"] * 3               # the fake attacks write no file; the checkpoint is there


def test_an_unknown_row_is_a_sentence(asked, tmp_path):
    with pytest.raises(UserError, match="'magic' is unknown; give some of base, negative prompt"):
        rivals.main(rivals.parse_args(["--rows", "magic", "--output-dir", str(tmp_path)]))


def test_a_checkpoint_names_its_own_guide():
    from evaluate import with_guide
    assert with_guide("out/a+sld-medium") == ("out/a", "sld-medium") and with_guide("base+negative") == (None, "negative")
    assert with_guide("base+negative:brown, round") == (None, "negative:brown, round")
    assert with_guide("out/a") == ("out/a", None) and with_guide("out/a+b") == ("out/a+b", None)
