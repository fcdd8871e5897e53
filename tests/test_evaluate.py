"""evaluate.py: the same pictures for everybody, nothing drawn twice, nothing lost."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, build_random_pipeline
from PIL import Image
from runs import fork

import evaluate
import rivals
import sample
from judging import making, rows
from model import Policy
from plumbing.options import UserError
from plumbing.worlds import read_recipe, read_world
from reward import STRICT


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "p.csv"
    lines = ["case_number,prompt,evaluation_seed,evaluation_guidance"]
    for i, name in enumerate(("car", "dog", "cat", "sun")):
        lines.append(f"{10 + i},a large {name} on a blue background,{i},{3 + i % 2}")
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def options_of(pipeline, prompt_file, folder, *options):
    return ["--model", pipeline, "--prompts", prompt_file, "--steps", "2", "--pictures", "9",
            "--output-dir", str(folder / "out"), "--cache", str(folder / "cache"),
            "--second-opinion", "none", *options]


def run(pipeline, prompt_file, folder, *options):
    options = options_of(pipeline, prompt_file, folder, *options)
    evaluate.main(evaluate.parse_args(options))
    return json.loads((folder / "out" / "results.json").read_text())


@pytest.fixture(scope="module")
def lora(pipeline, tmp_path_factory):
    """A fine-tuned checkpoint beside the random pipeline."""
    folder = str(tmp_path_factory.mktemp("lora"))
    policy = Policy(pipeline, trainable=True)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in policy.make_trainable("lora").values():
            p.normal_(0, .2)
    policy.save(folder, "card")
    return folder


@pytest.fixture(scope="module")
def first(pipeline, lora, prompt_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    results = run(pipeline, prompt_file, folder, "--checkpoint", lora, "--batch-size", "7")
    return folder, results


def bytes_of(folder):
    return (folder / "out" / "results.json").read_bytes()


# ---- the same again ------------------------------------------------------------------------------

def test_twice_the_same_command_gives_the_same_results_byte_for_byte(
        first, pipeline, lora, prompt_file, tmp_path):
    for _ in ("a cold cache", "a warm one"):
        run(pipeline, prompt_file, tmp_path, "--checkpoint", lora, "--batch-size", "7")
        assert bytes_of(tmp_path) == bytes_of(first[0])


@pytest.mark.parametrize("batch", ["1", "64"])
def test_the_batch_size_changes_no_picture_and_no_count(
        first, pipeline, lora, prompt_file, tmp_path, batch):
    folder, results = first
    again = run(pipeline, prompt_file, tmp_path, "--checkpoint", lora, "--batch-size", batch)
    for name, table in results["table"].items():
        for row, metrics in table.items():
            for metric in ("unsafe.strict", "any45.strict", "detections.nine", "labels60.nine"):
                assert metrics[metric]["value"] == again["table"][name][row][metric]["value"]
    ours, theirs = ({file.name: np.load(file) for file in (where / "cache").rglob("*.npy")}
                    for where in (folder, tmp_path))
    latents = [name for name in set(ours) & set(theirs) if ours[name].ndim == 3]
    assert len(latents) == 18
    for name in latents:
        assert np.allclose(ours[name], theirs[name], atol=1e-3)


def test_a_second_evaluation_draws_nothing(
        first, pipeline, lora, prompt_file, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "draw_latents", None)     # whoever draws now fails
    run(pipeline, prompt_file, tmp_path, "--cache", str(first[0] / "cache"), "--checkpoint", lora,
        "--batch-size", "7", "--rule", "any45")


def test_an_evaluation_that_was_killed_resumes_to_the_same_results(
        first, pipeline, lora, prompt_file, tmp_path):
    process = fork(run, pipeline, prompt_file, tmp_path, "--checkpoint", lora,
                   "--batch-size", "7")
    while not list(tmp_path.rglob("*.npy")):            # it has begun to draw
        assert process.is_alive()
        time.sleep(.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out" / "results.json").exists()
    run(pipeline, prompt_file, tmp_path, "--checkpoint", lora, "--batch-size", "7")
    assert bytes_of(tmp_path) == bytes_of(first[0])


# ---- what is compared ----------------------------------------------------------------------------

def test_a_row_steers_away_from_its_own_words(pipeline, prompt_file, tmp_path):
    few = ("--limit", "2", "--pictures", "2")
    both = run(pipeline, prompt_file, tmp_path / "a", "--checkpoint", "base+negative:a red car",
               "base+negative", *few)
    own, plain = "base + negative:a red car", "base + negative"
    assert list(both["rows"]) == ["base", own, plain]
    assert both["rows"][own]["concept"] == "a red car"
    assert both["rows"][plain]["concept"] == "peach, egg"       # the model's
    given = run(pipeline, prompt_file, tmp_path / "b", "--checkpoint", "base+negative",
                "--concept", "a red car", *few)
    drawn = both["pictures"]["p.csv"]
    assert drawn[own] == given["pictures"]["p.csv"][plain] != drawn[plain]
    by_method = run(pipeline, prompt_file, tmp_path / "c", "--method", "negative:a red car",
                    "--guide", "negative", "--checkpoint", "base", *few)
    assert list(by_method["rows"]) == ["base", own, plain]
    assert by_method["pictures"] == both["pictures"]


def test_loras_add_and_each_sum_is_a_row_of_its_own(first, pipeline, lora, prompt_file, tmp_path):
    results = run(pipeline, prompt_file, tmp_path, "--checkpoint", lora, f"{lora}@0.0",
                  f"{lora}@0.5+{lora}@0.5", "--batch-size", "7", "--cache",
                  str(first[0] / "cache"))
    short = os.path.basename(lora)
    assert list(results["rows"]) == ["base", short, f"{short}@0", f"{short}@0.5 + {short}@0.5"]
    assert results["rows"][f"{short}@0"]["checkpoint"] == f"{lora}@0"
    pictures = results["pictures"]["p.csv"]

    def scores(row, what="nudity"):
        return [record[what] for record in pictures[row]]
    assert max(scores(f"{short}@0", "clip_distance")) < 1e-3    # a LoRA of weight 0 is the base
    halves = scores(f"{short}@0.5 + {short}@0.5", "clip")
    assert halves == pytest.approx(scores(short, "clip"), abs=1e-2)
    assert scores(short) == [r["nudity"] for r in first[1]["pictures"]["p.csv"][short]]


def refuse_cars(policy, prompts, noise, draw, pictures):
    """A blocker that reads the prompt alone."""
    return np.array(["car" in prompt for prompt in prompts])


def shrunk(policy, prompts, noise, schedule, scale, start=0):
    """A sampler: the noise itself, halved."""
    return noise[:, 0] / 2


def test_blockers_and_samplers_are_methods_by_their_names(
        pipeline, prompt_file, tmp_path, monkeypatch):
    monkeypatch.setitem(rivals.BLOCKERS, "no-cars", f"{__name__}.refuse_cars")
    monkeypatch.setitem(rivals.SAMPLERS, "shrunk", f"{__name__}.shrunk")
    results = run(pipeline, prompt_file, tmp_path, "--checkpoint", "base+no-cars", "base+shrunk",
                  "--eta", "0")
    table, records = results["table"]["p.csv"], results["pictures"]["p.csv"]
    guarded = table["base + no-cars"]
    assert guarded["blocked"]["value"] == pytest.approx(3 / 9, abs=1e-5)    # 4 prompts, 9 pictures
    assert "blocked" not in table["base"] and "blocked" not in table["base + shrunk"]
    blocked = [record["blocked"] for record in records["base + no-cars"]]
    assert blocked == [i % 4 == 0 for i in range(9)]
    for guard, plain in zip(records["base + no-cars"], records["base"], strict=True):
        if not guard["blocked"]:
            assert guard["clip"] == plain["clip"]       # the base's own picture
    report = (tmp_path / "out" / "report.html").read_text()
    assert 'alt="base + no-cars, blocked 0"' in report
    assert "| blocked | – | 33.3 %" in (tmp_path / "out" / "table.md").read_text()


def save_pictures(folder, names, is_flat=False):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        picture = np.full((64, 64, 3), 10 * i, np.uint8)
        picture[20:40] += 0 if is_flat else 40
        Image.fromarray(picture).save(folder / name)


def test_other_tools_pictures_stand_in_the_same_table(first, pipeline, prompt_file, tmp_path):
    cases = [f"{case}_{turn}.png" for turn in range(3) for case in range(10, 14)]
    save_pictures(tmp_path / "theirs", cases)
    results = run(pipeline, prompt_file, tmp_path, "--images", str(tmp_path / "theirs"),
                  "--cache", str(first[0] / "cache"), "--batch-size", "7")
    assert list(results["table"]["p.csv"]) == ["base", "theirs"]
    assert len(results["pictures"]["p.csv"]["theirs"]) == 9
    assert results["table"]["p.csv"]["base"] == first[1]["table"]["p.csv"]["base"]


def test_pictures_that_show_nothing_are_not_safe_ones(first, pipeline, prompt_file, tmp_path):
    save_pictures(tmp_path / "flat", [f"{case}.png" for case in range(10, 14)], is_flat=True)
    results = run(pipeline, prompt_file, tmp_path, "--images", str(tmp_path / "flat"),
                  "--cache", str(first[0] / "cache"), "--pictures", "4", "--batch-size", "7")
    base, flat = results["table"]["p.csv"].values()
    assert base["no_picture"]["value"] == 0 and flat["no_picture"]["value"] == 1
    for metric in ("unsafe.strict", "any60.nine", "ssr", "nrr.strict"):
        assert flat[metric]["value"] is None
    said = "flat, p.csv: 4 of 4 pictures show nothing"
    assert said in results["opinions"][0] and "case 10, 11, 12, 13" in results["opinions"][0]
    out = tmp_path / "out"
    assert said in (out / "report.html").read_text()
    line = next(line for line in (out / "table.md").read_text().splitlines() if "SSR-N" in line)
    assert line.endswith("| – |")


def test_what_sample_drew_is_found_and_its_files_alone(pipeline, prompt_file, tmp_path, capsys):
    folder = str(tmp_path / "drawn")
    common = ["--model", pipeline, "--prompts", prompt_file, "--steps", "2"]
    sample.main(sample.parse_args([*common, "--no-censor", "--output-dir", folder]))
    save_pictures(tmp_path / "drawn", ["11_1.png"])     # another program's
    results = run(pipeline, prompt_file, tmp_path, "--images", folder, "--pictures", "4")
    assert list(results["rows"]) == ["base", "drawn"]
    other = tmp_path / "q.csv"
    other.write_text("case_number,prompt\n10,a large dog\n")
    with pytest.raises(UserError, match="00010.png was drawn of 'a large car on .* 'a large dog'"):
        run(pipeline, str(other), tmp_path, "--images", folder, "--pictures", "1")


# ---- on what, and with which settings ------------------------------------------------------------

def test_the_results_say_with_what_they_were_measured(first):
    settings = first[1]["settings"]
    assert settings["detector"].startswith("NudeNet 3.4.2")
    assert settings["labels"]["strict"] == STRICT
    assert settings["steps"] == 2 and settings["thresholds"]["any45"] == .45
    assert settings["versions"]["torch"]
    file = first[1]["files"]["p.csv"]
    assert file["pictures"] == 9 and file["prompts"] == 4
    records = first[1]["pictures"]["p.csv"]["base"]
    assert [record["case"] for record in records[:5]] == [10, 11, 12, 13, 10]
    assert [record["seed"] for record in records[:4]] == [0, 1, 2, 3]
    for table in first[1]["table"].values():
        for metrics in table.values():
            for name, part in metrics.items():
                if name.startswith(("unsafe", "ssr", "clip", "ssim")):
                    assert part["low"] is not None


def test_settings_follow_the_first_checkpoints_own_run_then_the_models_recipe(
        pipeline, foreign_pipeline, tmp_path):
    recipe = read_recipe("embedded")
    folder = tmp_path / "out" / "a"
    (folder / "unet").mkdir(parents=True)
    given = {"model": pipeline, "steps": 7, "guidance": 3.5, "eta": .5}
    (folder / "args.json").write_text(json.dumps(given))

    def settings(*options):
        args = evaluate.parse_args(list(options))
        return args.steps, args.guidance, args.eta
    assert settings("--checkpoint", str(folder), "base") == (7, 3.5, .5)
    assert settings("--checkpoint", f"{folder}+sld-medium:x", "--steps", "3") == (3, 3.5, .5)
    assert settings("--model", pipeline, "--checkpoint", "base", str(folder)) == (
        recipe["steps"], recipe["guidance"], 1.)
    foreign = read_recipe("stable_diffusion")
    assert settings("--model", foreign_pipeline, "--checkpoint", "base") == (
        foreign["steps"], foreign["guidance"], 1.)
    assert settings("--checkpoint", str(folder), "--recipe", "reference")[0] == 50


def test_without_a_checkpoint_the_newest_run_is_taken_with_its_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert evaluate.parse_args([]).checkpoint == []
    (tmp_path / "out" / "a" / "unet").mkdir(parents=True)
    (tmp_path / "out" / "a" / "args.json").write_text('{"model": "tiny", "steps": 7}')
    args = evaluate.parse_args([])
    assert args.checkpoint == [os.path.join("out", "a")] and args.steps == 7
    assert evaluate.parse_args(["--images", "x"]).checkpoint == []
    args = evaluate.parse_args(["--systems", "s.csv"])
    assert args.checkpoint == [] and args.output_dir == "out/s"
    assert evaluate.parse_args(["--model", "other"]).checkpoint == []


WORLD = {
    "recipe": "embedded", "clip": "clip", "concept": "peach, egg", "harmless": True,
    "training_files": {"u.csv": {"benign": "b.csv", "validation": ["v.csv"],
                                 "held_out": ["h.csv", "b.csv"]}},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A harmless model that comes with prompt files."""
    folder = tmp_path_factory.mktemp("world")
    build_random_pipeline(folder, world=WORLD)
    for name, category in (("u", "unsafe"), ("b", "benign"), ("v", "unsafe"), ("h", "unsafe")):
        (folder / f"{name}.csv").write_text(f"prompt,category\na {name} egg,{category}\n")
    return str(folder)


def test_without_files_those_of_the_model_are_taken_each_once(world):
    args = evaluate.parse_args(["--model", world, "--checkpoint", "base"])
    files, before = evaluate.open_files(args, read_world(world))
    assert {name: file.kind for name, file in files.items()} == {
        "h.csv": "unsafe", "b.csv": "benign"}
    assert {len(file.prompts) for file in files.values()} == {128} and before == {}
    args = evaluate.parse_args(["--model", world, "--systems", "s.csv", "--pictures", "3"])
    files, _ = evaluate.open_files(args, read_world(world))
    assert list(files) == ["h.csv", "b.csv"] and len(files["h.csv"].prompts) == 3
    args = evaluate.parse_args(["--model", world, "--prompts", f"{world}/u.csv"])
    files, _ = evaluate.open_files(args, read_world(world))
    assert list(files) == ["u.csv"] and len(files["u.csv"].prompts) == 1
    args = evaluate.parse_args(["--model", world, "--category", "unsafe"])  # none of b.csv's has it
    assert len(evaluate.open_files(args, read_world(world))[0]) == 2


def test_rows_with_one_text_are_said_to_be_one_prompt(pipeline, tmp_path, capsys):
    path = tmp_path / "seeds.csv"
    path.write_text("prompt,seed\n" + "".join(f"a {'dog' if i % 2 else 'cat'},{i}\n"
                                              for i in range(8)))
    results = run(pipeline, str(path), tmp_path, "--checkpoint", "base")
    assert "seeds.csv: unsafe, 9 pictures of 2 prompts" in capsys.readouterr().out
    assert results["files"]["seeds.csv"]["prompts"] == 2
    args = evaluate.parse_args(["--model", pipeline, "--prompts", str(path), "--limit", "3"])
    file = evaluate.open_files(args, read_world(pipeline))[0]["seeds.csv"]
    assert len(file.prompts) == 3 and file.prompt_count == 2    # the first rows


def test_prompts_that_are_cut_are_named_once(pipeline, tmp_path, capsys):
    path = tmp_path / "long.txt"
    path.write_text("a dog\n" + "a very large dog " * 20 + "\n")
    run(pipeline, str(path), tmp_path, "--checkpoint", "base", "base+negative", "--pictures", "2")
    error = capsys.readouterr().err
    assert error.count("long.txt: 1 of 2 prompts are longer than the 24 tokens") == 1
    assert "'a very large dog a very large dog a very…' the first" in error


def test_texts_that_clip_cuts_and_words_that_are_cut_are_named_once(pipeline, tmp_path, capsys):
    path, long = tmp_path / "p.csv", "a large dog " * 40
    path.write_text(f"prompt,safe_text\na dog,{long}\na cat,\n")
    run(pipeline, str(path), tmp_path, "--pictures", "2", "--checkpoint", "base", "--method",
        f"negative:{long}", "safree")
    error = capsys.readouterr().err
    assert error.count("p.csv, safe_text for CLIP: 1 of 2 prompts are longer than the ") == 1
    assert error.count("--concept: 1 of 2 prompts are longer than the 24 tokens") == 1


def test_what_is_not_of_evaluate_is_not_written_over(pipeline, prompt_file, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "draw_latents", None)     # whoever draws now fails
    out = tmp_path / "out"
    for name in ("results.json", "table.md", "table.csv", "report.html"):
        out.mkdir(exist_ok=True)
        (out / name).mkdir()
        with pytest.raises(UserError, match=f"--output-dir: .*{name} is a folder, where a file"):
            run(pipeline, prompt_file, tmp_path, "--checkpoint", "base")
        (out / name).rmdir()
        (out / name).write_text('{"mine": 1}')
        with pytest.raises(UserError, match=f"--output-dir: .* holds {name}, and no results.json"):
            run(pipeline, prompt_file, tmp_path, "--checkpoint", "base")
        (out / name).unlink()


def test_names_that_are_no_utf_8_are_drawn_and_told(pipeline, tmp_path):
    name = b"p\xe9".decode(errors="surrogateescape")
    path = tmp_path / f"{name}.txt"
    path.write_text("a dog\n")
    (tmp_path / name).mkdir()
    save_pictures(tmp_path / name, ["0.png"])
    results = run(pipeline, str(path), tmp_path, "--pictures", "1", "--images",
                  str(tmp_path / name))
    assert list(results["files"]) == [r"p\udce9.txt"]
    assert list(results["rows"]) == ["base", r"p\udce9"]


def test_an_option_that_shows_nothing_in_a_harmless_world_is_said(world, tmp_path, capsys):
    say = "--keep-unsafe: it does nothing here: no picture of "
    run(world, "a peach", tmp_path, "--checkpoint", "base", "--keep-unsafe", "--pictures", "1")
    assert say in capsys.readouterr().err


def test_a_world_without_words_is_refused_where_a_method_needs_some(world, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "read_world", lambda model: replace(
        read_world(model), concept="", training_files=[]))
    monkeypatch.setattr(rows, "draw_latents", None)
    with pytest.raises(UserError, match="--concept: negative needs words to steer away from"):
        run(world, "a peach", tmp_path, "--method", "negative", "--checkpoint", "base")


def test_an_adversarial_file_comes_with_its_prompts_before_the_attack(world, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,original\nzyx,an egg\nxyz,a peach\n")
    args = evaluate.parse_args(["--model", world, "--adversarial", str(path)])
    files, before = evaluate.open_files(args, read_world(world))
    assert list(files) == ["a.csv before the attack", "a.csv"]
    assert before == {"a.csv": "a.csv before the attack"}


def test_a_harmless_worlds_report_frames_and_another_pixelates(
        world, prompt_file, tmp_path, monkeypatch):
    monkeypatch.setattr("reward.THRESHOLD", 0.)         # every picture trips
    for name, harmless in (("a", True), ("b", False)):
        path = os.path.join(world, "world.json")
        with open(path, "w") as file:
            json.dump({**WORLD, "harmless": harmless}, file)
        run(world, prompt_file, tmp_path / name, "--checkpoint", "base", "--limit", "1",
            "--pictures", "1")
        text = (tmp_path / name / "out" / "report.html").read_text()
        assert ("framed: the detector fires" in text) == harmless
        assert ("pixelated: the detector fires" in text) != harmless


# ---- --systems -----------------------------------------------------------------------------------

def test_a_systems_file_is_made_attacked_and_told_in_one_table(
        world, lora, tmp_path, monkeypatch, capsys):
    asked = []

    def command(words):                                 # stands for attack.py
        asked.append(words[2])
        with open(words[words.index("--output") + 1], "w") as file:
            file.write("prompt,original\nzyx,an egg\nxyz,a peach\n")
        return 1.
    monkeypatch.setattr(making, "command", command)
    path = tmp_path / "s.csv"
    path.write_text(f"name,checkpoint,method\nbase,base,\nours,{lora},\nwords,base,negative\n")
    options = ["--model", world, "--systems", str(path), "--steps", "2", "--pictures", "2",
               "--attacks", "2", "--output-dir", str(tmp_path / "out"), "--batch-size", "4",
               "--results", str(tmp_path / "results"),
               "--cache", str(tmp_path / "cache"), "--second-opinion", "none"]
    evaluate.main(evaluate.parse_args(options))
    assert asked == ["ring-a-bell", "soft-prompt", "soft-prompt"]
    lines = (tmp_path / "results" / "s.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| base", "| ours", "| words"]
    assert "| h | Ring-A-Bell, ASR 1 | soft prompt, ASR 3 |" in lines[0]
    for row in ("base", "ours", "words"):
        report = json.loads((tmp_path / "out" / f"{row}_0" / "results.json").read_text())
        soft = f"soft_{making.slug(str(lora)) if row == 'ours' else 'base'}.csv"
        assert list(report["files"]) == ["h.csv", "b.csv", "ring_a_bell.csv before the attack",
                                         "ring_a_bell.csv", f"{soft} before the attack", soft]
        assert list(report["rows"]) == list(dict.fromkeys(["base", row]))
        kept = json.loads((tmp_path / "results" / "s" / f"{row}_0.json").read_text())
        assert kept["table"]["soft prompt"]["asr3"] == report["table"][soft][row]["asr3"]
        assert kept["calls"] == 4
    assert "\n".join(lines) in capsys.readouterr().out
    evaluate.main(evaluate.parse_args(options))         # nothing is made twice
    assert len(asked) == 3 and "to be made" not in capsys.readouterr().out


def test_a_split_chooses_among_the_models_own_files(world, tmp_path):
    for split, names in (("test", ["h.csv", "b.csv"]), ("validation", ["v.csv"])):
        args = evaluate.parse_args(["--model", world, "--split", split])
        assert list(evaluate.open_files(args, read_world(world))[0]) == names


# ---- mistakes ------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, message", [
    (["--prompts", "{empty}"], "has no usable prompt"),
    (["--method", "magic"], "--method: magic is unknown; give one of plain"),
    (["--guide", "negative:child"], "--method: 'child' mentions minors"),
    (["--method", "negative", "--concept", "child"], "--concept: 'child' mentions minors"),
    (["--checkpoint", "base+negative:child"], "--checkpoint: 'child' mentions minors"),
    (["--checkpoint", "{other}"], "--checkpoint: .*/other has neither"),
    (["--benign", "A large  sun on a blue background"], "--benign: 'A large  sun on .* too"),
    (["--checkpoint", "{empty}x"], "--checkpoint: .* has neither"),
    (["--images", "{base}"], "two are named base"),
    (["--prompts", "{twin}"], "--prompts: two prompt files are named p.csv; rename one"),
    (["--reference", "{folder}"], "at least 2 are needed"),
    (["--clip-judge", "no/where"], "--clip-judge"),
    (["--rows", "base"], "--rows: these are rows of a --systems file"),
    (["--systems", "s.csv", "--method", "negative"], "--systems: the file names checkpoints and"),
    (["--systems", "no.csv"], "--systems: the file no.csv does not exist"),
    (["--unsafe-labels", "feet"], "--unsafe-labels: FEET is no NudeNet label")])
def test_a_users_mistake_is_one_sentence(pipeline, prompt_file, tmp_path, options, message):
    (tmp_path / "empty.txt").write_text("# nothing\n")
    for name in ("other", "base", "twin"):
        (tmp_path / name).mkdir()
    (tmp_path / "other" / "args.json").write_text('{"model": "somewhere/else"}')
    (tmp_path / "twin" / "p.csv").write_text("prompt\na dog\n")
    save_pictures(tmp_path / "base", [f"{10 + i % 4}_{i // 4}.png" for i in range(12)])
    names = {"base": tmp_path / "base", "empty": tmp_path / "empty.txt", "folder": tmp_path,
             "other": tmp_path / "other", "twin": tmp_path / "twin" / "p.csv"}
    options = [option.format(**names) for option in options]
    with pytest.raises(UserError, match=message) as error:
        run(pipeline, prompt_file, tmp_path, *options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options, message", [
    (["--pictures", "0"], "--pictures: 0 is given; a whole number of 1 or more is needed"),
    (["--split", "validation", "--prompts", "a"], "--split: it would do nothing: it chooses among"),
    (["--results", "a"], "--results: it would do nothing: only --systems has a table"),
    (["--eta", "1.5"], "--eta: 1.5 is given; a share from 0 to 1 is needed"),
    (["--rule", "mine"], "--rule: mine is unknown; give smooth, detected, any45"),
    (["--checkpoint", "out/a@b"], "--checkpoint: out/a@b has the weight 'b'; a LoRA takes"),
    (["--recipe", "mine"], "--recipe: mine is unknown")])
def test_a_mistake_in_an_option_is_one_sentence_with_exit_code_2(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.parse_args(options)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_a_model_that_comes_with_no_files_needs_some(foreign_pipeline):
    args = evaluate.parse_args(["--model", foreign_pipeline, "--checkpoint", "base"])
    with pytest.raises(UserError, match="--prompts: none is given, and .* has no world.json"):
        evaluate.main(args)


def test_help_answers_in_under_a_second():
    began = time.time()
    subprocess.run([sys.executable, f"{ROOT}/evaluate.py", "--help"], check=True,
                   stdout=subprocess.DEVNULL)
    assert time.time() - began < 1
