"""evaluate.py: the same pictures for everybody, nothing drawn twice, nothing lost."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import evaluate
from evaluate import as_file, folder_row
from prompts import Prompt, UserError
from reward import STRICT

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "p.csv"
    path.write_text("case_number,prompt,evaluation_seed,evaluation_guidance\n" + "".join(
        f"{10 + i},a large {name} on a blue background,{i},{3 + i % 2}\n" for i, name in enumerate(("car", "dog", "cat", "sun"))))
    return str(path)


def run(pipeline, prompt_file, folder, *options):
    evaluate.main(evaluate.parse_args(["--model", pipeline, "--prompts", prompt_file, "--steps", "2", "--pictures", "9", "--output-dir",
                                       str(folder / "out"), "--cache", str(folder / "cache"), "--second-opinion", "none", *options]))
    return json.loads((folder / "out" / "results.json").read_text())


@pytest.fixture(scope="module")
def lora(pipeline, tmp_path_factory):
    """A fine-tuned checkpoint beside the random pipeline."""
    import torch
    from model import Policy
    folder = str(tmp_path_factory.mktemp("lora"))
    policy = Policy(pipeline, trainable=True)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in policy.train("lora").values():
            p.normal_(0, .2)
    policy.save(folder, "card")
    return folder


@pytest.fixture(scope="module")
def first(pipeline, lora, prompt_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    return folder, run(pipeline, prompt_file, folder, "--checkpoint", lora, "--batch-size", "7")


def test_twice_the_same_command_gives_the_same_results_byte_for_byte(first, pipeline, lora, prompt_file, tmp_path):
    folder, _ = first
    run(pipeline, prompt_file, tmp_path, "--checkpoint", lora, "--batch-size", "7")              # a cold cache
    mine = (tmp_path / "out" / "results.json").read_bytes()
    assert mine == (folder / "out" / "results.json").read_bytes()
    run(pipeline, prompt_file, tmp_path, "--checkpoint", lora, "--batch-size", "7")              # a warm one
    assert mine == (tmp_path / "out" / "results.json").read_bytes()


@pytest.mark.parametrize("batch", ["1", "64"])
def test_the_batch_size_changes_no_picture_and_no_count(first, pipeline, lora, prompt_file, tmp_path, batch):
    folder, results = first
    again = run(pipeline, prompt_file, tmp_path, "--checkpoint", lora, "--batch-size", batch)
    for name, rows in results["table"].items():
        for row, metrics in rows.items():
            for metric in ("unsafe.strict", "any45.strict", "detections.nine", "labels60.nine"):
                assert metrics[metric]["value"] == again["table"][name][row][metric]["value"]
    mine, theirs = ({f.name: np.load(f) for f in (where / "cache").rglob("*.npy")} for where in (folder, tmp_path))
    latents = [name for name in set(mine) & set(theirs) if mine[name].ndim == 3]
    assert len(latents) == 18 and all(np.allclose(mine[n], theirs[n], atol=1e-3) for n in latents)


def test_a_second_evaluation_draws_nothing(first, pipeline, lora, prompt_file, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "rollouts", None)                         # whoever draws now fails
    run(pipeline, prompt_file, tmp_path, "--cache", str(first[0] / "cache"), "--checkpoint", lora, "--batch-size", "7", "--rule", "any45")


def test_a_row_steers_away_from_its_own_words(pipeline, prompt_file, tmp_path):
    both = run(pipeline, prompt_file, tmp_path / "a", "--checkpoint", "base+negative:a red car", "base+negative", "--limit", "2", "--pictures", "2")
    mine, words = "base + negative:a red car", both["rows"]
    assert words[mine]["concept"] == "a red car" != words["base + negative"]["concept"]
    given = run(pipeline, prompt_file, tmp_path / "b", "--checkpoint", "base+negative", "--concept", "a red car", "--limit", "2", "--pictures", "2")
    drawn = both["pictures"]["p.csv"]
    assert drawn[mine] == given["pictures"]["p.csv"]["base + negative"] != drawn["base + negative"]


def test_the_results_say_with_what_they_were_measured(first):
    settings = first[1]["settings"]
    assert settings["detector"].startswith("NudeNet 3.4.2") and settings["labels"]["strict"] == STRICT
    assert settings["steps"] == 2 and settings["thresholds"]["any45"] == .45 and settings["versions"]["torch"]
    file = first[1]["files"]["p.csv"]
    assert file["pictures"] == 9 and file["prompts"] == 4
    records = first[1]["pictures"]["p.csv"]["base"]
    assert [r["case"] for r in records[:5]] == [10, 11, 12, 13, 10] and [r["seed"] for r in records[:4]] == [0, 1, 2, 3]
    for rows in first[1]["table"].values():
        for metrics in rows.values():
            assert all(part["low"] is not None for name, part in metrics.items() if name.startswith(("unsafe", "ssr", "clip", "ssim")))


def test_a_prompts_own_guidance_and_seed_are_part_of_what_its_latent_is_named_by(prompt_file):
    file = evaluate.open_file(prompt_file)
    args = evaluate.parse_args([])
    keys = evaluate.keys_of(file, "f", "plain", args, (4, 8, 8))
    args.guidance = 9.                                                      # every prompt brings its own
    assert keys == evaluate.keys_of(file, "f", "plain", args, (4, 8, 8)) and len(set(keys)) == 4
    for other in (evaluate.keys_of(file, "g", "plain", args, (4, 8, 8)), evaluate.keys_of(file, "f", "sld", args, (4, 8, 8)),
                  evaluate.keys_of(file, "f", "plain", args, (4, 16, 16))):
        assert not set(keys) & set(other)


def test_two_programs_write_one_store_at_once_without_harm(tmp_path):
    code = ("import sys, numpy as np; sys.path.insert(0, sys.argv[1])\nfrom evaluate import Store\nstore = Store(sys.argv[2])\n"
            "for turn in range(30):\n for k in range(20):\n  store[f'{k:02d}x'] = np.full((64, 64), k, np.float32)\n  assert (store[f'{k:02d}x'] == k).all()")
    programs = [subprocess.Popen([sys.executable, "-c", code, ROOT, str(tmp_path)]) for _ in range(2)]
    assert [p.wait(120) for p in programs] == [0, 0]
    assert not list(tmp_path.rglob("*.tmp")) and len(list(tmp_path.rglob("*.npy"))) == 20


def save_pictures(folder, names, size=64):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        Image.fromarray(np.full((size, size, 3), 10 * i, np.uint8)).save(folder / name)


def test_other_tools_pictures_stand_in_the_same_table(first, pipeline, prompt_file, tmp_path):
    save_pictures(tmp_path / "theirs", [f"{case}_{turn}.png" for turn in range(3) for case in range(10, 14)])
    results = run(pipeline, prompt_file, tmp_path, "--images", str(tmp_path / "theirs"), "--cache", str(first[0] / "cache"), "--batch-size", "7")
    assert list(results["table"]["p.csv"]) == ["base", "theirs"] and len(results["pictures"]["p.csv"]["theirs"]) == 9
    assert results["table"]["p.csv"]["base"] == {**first[1]["table"]["p.csv"]["base"]}


def test_pictures_are_found_by_case_number_and_turn(tmp_path):
    file = as_file("p.csv", "unsafe", [Prompt("a", case=3), Prompt("b", case=12)], 4, 0, 0)
    save_pictures(tmp_path / "x", ["3_0.png", "3_1.png", "0012_0.png", "12_1.jpg"])
    block = folder_row(str(tmp_path / "x"), {"p.csv": file}).look(file, 0)
    assert block[:, 0, 0, 0].tolist() == [0, 20, 10, 30]
    twice = as_file("p.csv", "unsafe", [Prompt("a", case=3), Prompt("b", case=3)], None, 0, 0)     # rows that share a number
    assert folder_row(str(tmp_path / "x"), {"p.csv": twice}).look(twice, 0)[:, 0, 0, 0].tolist() == [0, 10]


@pytest.mark.parametrize("spoil, said", [
    (lambda folder: folder.mkdir(), "holds no picture named by case number"),
    (lambda folder: save_pictures(folder, ["0.png"]), "lacks 1 of the 2 pictures that p.csv asks for, case 1 the first"),
    (lambda folder: (save_pictures(folder, ["0.png", "1.png"]), (folder / "1.png").write_bytes(b"torn")), "1.png is no readable picture"),
    (lambda folder: (save_pictures(folder, ["0.png"]), save_pictures(folder, ["1.png"], 32)), "one size is needed")])
def test_what_is_wrong_with_a_folder_of_pictures_is_one_sentence(tmp_path, spoil, said):
    file = as_file("p.csv", "unsafe", [Prompt("a", case=0), Prompt("b", case=1)], None, 0, 0)
    spoil(tmp_path / "x")
    with pytest.raises(UserError, match=said):
        folder_row(str(tmp_path / "x"), {"p.csv": file}).look(file, 0)


@pytest.mark.parametrize("options, said", [
    (["--prompts", "{empty}"], "has no usable prompt"), (["--guide", "magic"], "--guide: magic is unknown; give some of plain"),
    (["--checkpoint", "{other}"], "was trained on somewhere/else, not on"), (["--checkpoint", "{empty}"], "--checkpoint"),
    (["--images", "{base}"], "two are named base"), (["--checkpoint", "base+negative:child"], "'child' mentions minors"),
    (["--pictures", "0"], "--pictures: 0"), (["--reference", "{folder}"], "at least 2 are needed"), (["--clip-judge", "no/where"], "--clip-judge")])
def test_a_users_mistake_is_one_sentence(pipeline, prompt_file, tmp_path, options, said):
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "args.json").write_text('{"model": "somewhere/else"}')
    (tmp_path / "base").mkdir()
    for case, turn in np.ndindex(4, 3):
        Image.new("RGB", (64, 64)).save(tmp_path / "base" / f"{10 + case}_{turn}.png")
    names = {"base": tmp_path / "base", "empty": tmp_path / "empty.txt", "other": tmp_path / "other", "folder": tmp_path}
    options = [option.format(**names) for option in options]
    with pytest.raises(UserError, match=said):
        run(pipeline, prompt_file, tmp_path, *options)


def test_an_evaluation_that_was_killed_goes_on_to_the_same_results(first, pipeline, lora, prompt_file, tmp_path):
    import signal
    import time
    command = [sys.executable, f"{ROOT}/evaluate.py", "--model", pipeline, "--prompts", prompt_file, "--steps", "2", "--pictures", "9",
               "--output-dir", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--second-opinion", "none", "--checkpoint", lora,
               "--batch-size", "7"]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.rglob("*.npy")):                                # it has begun to draw
        assert process.poll() is None
        time.sleep(.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "results.json").exists()
    run(pipeline, prompt_file, tmp_path, "--checkpoint", lora, "--batch-size", "7")
    assert (tmp_path / "out" / "results.json").read_bytes() == (first[0] / "out" / "results.json").read_bytes()
