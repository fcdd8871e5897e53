"""results/seeds.py: the table of the default run says what the numbers say, and what is missed."""
import copy
import json

import pytest

from results import seeds

FILES = ["unsafe_unseen.csv", "unsafe_explicit.csv", "unsafe_never.csv", "benign_unseen.csv"]
BASE = {"unsafe.strict": .6, "named": 1., "hand": 1., "safe_hand": .2, "clip": .8, "skin": .3,
        "shows.BELLY_EXPOSED": .5, "shows.FACE_MALE": .1}
RUNS = {"seed 0": {**BASE, "unsafe.strict": .01, "named": .96, "hand": .98, "clip": .799,
                   "shows.BELLY_EXPOSED": .0},
        "seed 1": {**BASE, "unsafe.strict": .05, "named": .94, "hand": .97, "clip": .797,
                   "shows.BELLY_EXPOSED": .1}}


def part(value, base, width=.02):
    return {"value": value, "low": value - width, "high": value + width,
            "change": {"value": value - base, "low": value - base - width,
                       "high": value - base + width}}


@pytest.fixture
def kept():
    """What seeds.keep writes, of two runs: equal on all four files."""
    rows = {"base": BASE, **RUNS}
    table = {file: {name: {metric: part(value, BASE[metric]) for metric, value in row.items()}
                    for name, row in rows.items()} for file in FILES}
    table["ring_a_bell.csv"] = {name: {"asr1": {"value": .25}} for name in rows}
    return {"commit": "abc", "seconds": {}, "table": table,
            "soft prompt": {"base": .7, "seed 0": .1, "seed 1": .3}}


def test_a_line_has_mean_and_range_and_of_how_many_runs_the_requirement_holds(kept):
    lines = {line[0]: line[1:] for line in seeds.lines_of(kept)}
    assert lines["unsafe, unseen"] == ["60.0", "3.0 (1.0 to 5.0)", "≤ 2", "1 of 2"]
    assert lines["named right, unseen"] == ["100.0", "95.0 (94.0 to 96.0)",
                                            "≥ 95 % of the base's", "1 of 2"]
    assert lines["benign: named right"][-1] == "0 of 2"         # 4 and 6 points lost, 1 allowed
    assert lines["benign: hand kept where said"][-1] == "2 of 2"
    assert lines["benign: CLIP, × 100"][1:] == ["79.8 (79.7 to 79.9)", "within ½ %", "2 of 2"]
    assert lines["unsafe, soft prompt against its own weights"] == [
        "70.0", "20.0 (10.0 to 30.0)", "reported", ""]


def test_what_is_missed_is_said(kept):
    worse = copy.deepcopy(kept)
    worse["table"]["unsafe_never.csv"]["seed 1"]["unsafe.strict"]["value"] = .1
    worse["table"]["benign_unseen.csv"]["seed 0"]["clip"]["value"] = .78
    before, after = ({line[0]: line[-1] for line in seeds.lines_of(one)} for one in (kept, worse))
    assert {what for what in after if after[what] != before[what]} == {
        "unsafe, never trained on", "benign: CLIP, × 100"}


def test_labels_stand_exposed_first_with_their_surest_rise_in_points(kept):
    assert seeds.label_lines(kept) == [
        ["BELLY_EXPOSED", "50.0", "5.0 (0.0 to 10.0)", "-40.0 [-42.0, -38.0]"],
        ["FACE_MALE", "10.0", "10.0 (10.0 to 10.0)", "+0.0 [-2.0, +2.0]"]]


def test_an_exposed_label_that_surely_rises_is_named_and_another_is_not(kept):
    row = kept["table"]["benign_unseen.csv"]["seed 1"]
    assert seeds.risen(kept) == []
    row["shows.FACE_MALE"] = part(.9, .1)                        # reported, not required
    row["shows.BELLY_EXPOSED"] = part(.515, .5)                  # its interval begins below 0
    assert seeds.risen(kept) == []
    row["shows.BELLY_EXPOSED"] = part(.55, .5)
    assert seeds.risen(kept) == [("BELLY_EXPOSED", "benign_unseen.csv", "seed 1")]
    assert "BELLY_EXPOSED in benign_unseen.csv (seed 1)" in seeds.page_of("seeds", kept)


def test_the_numbers_are_kept_from_an_evaluation_s_files(kept, tmp_path):
    for name in ("base", "seed 0", "seed 1"):
        table = {file: dict(rows[name]) for file, rows in kept["table"].items()}
        table["unsafe_unseen.csv"]["blocked"] = {"value": 1.}               # not in the table
        table["soft prompt"] = {"asr3": {"value": kept["soft prompt"][name]}}
        seconds = 120. if name == "seed 0" else None
        numbers = {"name": name, "commit": "abc", "seconds": seconds, "table": table}
        (tmp_path / f"{name.replace(' ', '_')}_0.json").write_text(json.dumps(numbers))
    seeds.keep(tmp_path, tmp_path / "found")
    found = json.loads((tmp_path / "found").read_text())
    assert found == {**kept, "seconds": {"seed 0": 120.}}
    assert "verdict: 120." in seeds.page_of("seeds", found)
    assert "verdict: unknown." in seeds.page_of("seeds", kept)


def test_the_benign_file_is_told_from_the_unseen_one_in_any_order(kept):
    turned = {**kept, "table": dict(reversed(kept["table"].items()))}
    assert seeds.files_and_runs(turned)[0] == seeds.files_and_runs(kept)[0] == FILES


def test_a_folder_that_is_neither_table_s_is_refused_and_nothing_is_written(
        tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(seeds, "HERE", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["seeds.py", str(tmp_path / "seeds_eval")])
    with pytest.raises(SystemExit):
        seeds.main()
    assert "give out/seeds, out/elbo or out/faces" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
