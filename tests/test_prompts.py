"""prompts.py: files of the field, errors that name the line, what is kept back, what is drawn."""
import json
from types import SimpleNamespace

import numpy as np
import pytest

from plumbing.options import UserError
from prompts import (
    Prompt,
    category_in,
    cycle_prompts,
    draw,
    keep_back,
    read,
    read_all,
    training_prompts,
    write_prompts,
)


def file(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


# ---- reading -------------------------------------------------------------------------------------

def test_a_literal_text_is_one_prompt():
    prompts, refused = read("a large peach on a blue background")
    assert prompts == ["a large peach on a blue background"] and refused == 0


def test_a_text_file_has_one_prompt_per_line_and_comments(tmp_path):
    assert read(file(tmp_path, "p.txt", "# no\na dog\n\n  a cat \n"))[0] == ["a dog", "a cat"]


def test_a_jsonl_file_brings_all_columns(tmp_path):
    row = {"prompt": "a b", "safe_text": "a", "seed": 3, "guidance": 2.5, "category": "x"}
    p, = read(file(tmp_path, "p.jsonl", json.dumps(row)))[0]
    assert (p, p.safe_text, p.seed, p.guidance, p.category) == ("a b", "a", 3, 2.5, "x")


I2P_HEADER = ("prompt,categories,hard,inappropriate_percentage,nudity_percentage,q16_percentage,"
              "sd_safety_percentage,prompt_toxicity,lexica_url,sd_seed,sd_guidance_scale,"
              "sd_image_width,sd_image_height,sd_model\n")


def test_i2p_is_read_unmodified(tmp_path):
    rows = ('"a statue, marble","sexual, shocking",0,1,2,3,4,.1,u,1573886134,7,512,512,SD\n'
            '"a storm",violence,0,1,2,3,4,.1,u,22,7.5,512,512,SD\n')
    path = file(tmp_path, "i2p.csv", I2P_HEADER + rows)
    assert len(read(path)[0]) == 2
    p, = read(path, "sexual")[0]
    assert (p, p.seed, p.guidance) == ("a statue, marble", 1573886134, 7)
    assert p.safe_text == "a statue, marble"
    with pytest.raises(UserError, match="--category.*'hate'"):
        read(path, "hate")


def test_the_fields_other_csv_is_read_unmodified(tmp_path):
    text = "case_number,prompt,evaluation_seed,evaluation_guidance\n0,a dog,5,7.5\n"
    p, = read(file(tmp_path, "e.csv", text))[0]
    assert (p.seed, p.guidance) == (5, 7.5)


@pytest.mark.parametrize("name, text, sentence", [
    ("p.csv", "prompt,seed\na,1\nb,x\n", "line 3.*seed is 'x'"),
    ("p.csv", "prompt,seed\n,2\n", "no usable prompt"),
    ("p.csv", 'prompt,seed\na,1\n"a dog,2\na cat,3\n', "line 3 is not CSV"),
    ("p.csv", f"prompt,seed\na,1{'0' * 400}\n", "line 2: seed is '1000.*not a number"),
    ("p.jsonl", '{"prompt": ["a", "b"]}\n', "line 1: prompt is .'a', 'b'., not a text"),
    ("p.csv", 'prompt,seed\n"two\nlines",1\na,1,9\n', "line 4.*more fields"),
    ("p.csv", "prompt,guidance\na,0\n", "line 2: guidance is 0; 1 or more"),
    ("p.csv", "text,seed\na,1\n", "no column 'prompt'.*text, seed"),
    ("p.csv", "", "no column 'prompt'"),
    ("p.jsonl", '{"prompt": "a"}\n{"prompt"\n', "line 2 is not JSON"),
    ("p.jsonl", '{"text": "a"}\n', "line 1 has no 'prompt'"),
    ("p.txt", "# nothing\n", "no usable prompt"),
    ("p.json", "[]", "must end in"),
])
def test_a_bad_file_is_named_with_its_line(tmp_path, name, text, sentence):
    with pytest.raises(UserError, match=sentence):
        read(file(tmp_path, name, text))


def test_a_row_without_a_prompt_is_left_out_and_named(tmp_path, capsys):
    """I2P has one; the others keep their places."""
    prompts, refused = read(file(tmp_path, "p.csv", "prompt,category\na,x\n,y\nb,x\n"), "x")
    assert prompts == ["a", "b"] and [p.case for p in prompts] == [0, 2] and refused == 0
    assert "p.csv, line 3 is left out, its prompt is empty" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["nowhere.txt", "nowhere.tsv", "data/nowhere", "../nope",
                                    "p.csvx"])
def test_a_missing_file_is_not_taken_for_a_text(source):
    with pytest.raises(UserError, match="does not exist|neither a file nor a sentence"):
        read(source)
    assert read("peach.")[0] == ["peach."] and read("a and/or b.txt files")[0]


def test_several_files_are_read_one_after_the_other(tmp_path):
    one = file(tmp_path, "one.txt", "a dog\na naked child\n")
    two = file(tmp_path, "two.csv", "prompt,category\na cat,x\na bird,y\n")
    assert read_all([one, two, "a fish"]) == (["a dog", "a cat", "a bird", "a fish"], 1)
    prompts, _ = read_all([one, two], "x", optional_category=True)
    assert prompts == ["a dog", "a cat"]                # a file without the category is used whole
    cases = [prompt.case for prompt in read_all([one, two, "a fish"])[0]]
    assert len(set(cases)) == len(cases)                # pictures are named by their case


def test_a_category_counts_where_a_file_has_it(tmp_path):
    mixed = file(tmp_path, "i2p.csv",
                 'prompt,categories\na statue,"sexual, shocking"\na storm,violence\n')
    captions = file(tmp_path, "coco.csv", "caption\na dog\n")
    assert category_in(mixed, "Sexual ", "--held-out") == "Sexual "
    assert category_in(captions, "Sexual ", "--held-out") is None
    assert category_in(mixed, None, "--held-out") is None


# ---- what a training needs -----------------------------------------------------------------------

def args_of(pipeline, tmp_path, **given):
    options = dict(model=pipeline, prompts=None, benign=None, held_out=None, category=None,
                   benign_share=.25, output_dir=str(tmp_path / "run"))
    return SimpleNamespace(**{**options, **given})


def test_a_tenth_of_the_prompts_is_kept_back_and_judged(foreign_pipeline, tmp_path):
    unsafe = file(tmp_path, "u.txt", "".join(f"a dog number {i}x\n" for i in range(300)))
    benign = file(tmp_path, "b.txt", "".join(f"a cup number {i}x\n" for i in range(40)))
    args = args_of(foreign_pipeline, tmp_path, prompts=[unsafe], benign=[benign])
    data = training_prompts(args)
    data.write_kept_back()
    assert [len(data.prompts), len(data.benign)] == [270, 24]
    kept, kept_benign = (read(path)[0] for path in data.held_out)
    assert len(kept) == 30 and len(kept_benign) == 16
    assert not set(kept) & set(data.prompts) and not set(kept_benign) & set(data.benign)
    again = training_prompts(args)
    assert again.prompts == data.prompts and again.held_out == data.held_out


@pytest.mark.parametrize("count, kept", [(1, 0), (31, 0), (32, 16), (200, 20), (5000, 64)])
def test_16_to_64_are_kept_back_and_nothing_of_few(count, kept):
    prompts = [Prompt(f"number {i}") for i in range(count)] * 2     # repeated rows stay together
    train, back = keep_back(prompts)
    assert len(set(back)) == kept and len(back) == 2 * kept
    assert len(train) + len(back) == len(prompts) and not set(train) & set(back)


def test_a_worlds_training_file_brings_its_own_files(pipeline, tmp_path):
    world = tmp_path / "world"
    world.mkdir()
    for name in ("train", "benign", "test"):
        (world / f"{name}.csv").write_text(f"prompt\na {name} dog\n")
    (world / "world.json").write_text(json.dumps({"training_files": {
        "train.csv": {"benign": "benign.csv", "held_out": ["test.csv"]}}}))
    for prompts in (None, [f"{world}/../world/train.csv"]):
        args = args_of(str(world), tmp_path, prompts=prompts)
        data = training_prompts(args)
        assert data.prompts == ["a train dog"] and data.benign == ["a benign dog"]
        assert [read(path)[0] for path in data.held_out] == [["a test dog"]]
    given = args_of(str(world), tmp_path, held_out=[], benign=["a cup"])
    data = training_prompts(given)
    assert data.benign == ["a cup"] and data.held_out == []
    with pytest.raises(UserError, match="--prompts: none is given"):
        training_prompts(args_of(pipeline, tmp_path))


def test_prompts_are_written_as_they_are_read(tmp_path):
    prompts = [Prompt("a b", "a", 3, 2.5, "x, y", 7), Prompt('a "c", d', case=9)]
    write_prompts(str(tmp_path / "p.csv"), prompts)
    back, _ = read(str(tmp_path / "p.csv"))
    assert [(p, vars(p)) for p in back] == [(p, vars(p)) for p in prompts]


# ---- drawing -------------------------------------------------------------------------------------

def test_drawing_shows_every_prompt_before_any_comes_twice():
    drawn, is_benign = draw(list("abcd"), list("xy"), 8, .25, 0, 1)
    assert sorted(drawn[:4]) == list("abcd") and len(drawn) == 8 and sorted(drawn[6:]) == ["x", "y"]
    assert is_benign.tolist() == [False] * 6 + [True] * 2


def test_drawing_walks_on_from_epoch_to_epoch_and_needs_no_memory_of_the_past():
    epochs = [draw(list("abcde"), [], 2, 0, 3, epoch)[0] for epoch in range(1, 6)]
    walked = sum(epochs, [])
    assert sorted(walked[:5]) == sorted(walked[5:]) == list("abcde") and walked[:5] != walked[5:]
    assert draw(list("abcde"), [], 2, 0, 3, 4)[0] == epochs[3]


def test_once_all_were_seen_a_prompt_with_low_rewards_comes_more_often():
    """Rewards 0, 1, 1, 1: in deviations from the mean -1.73 and .58 three times, so that with
    hardness .5 the first's chance is e^.866 / (e^.866 + 3 e^-.289) = .514."""
    last, prompts = {"a": 0., "b": 1., "c": 1., "d": 1.}, list("abcd")
    drawn = [draw(prompts, [], 1, 0, 0, epoch, last, .5)[0][0] for epoch in range(4000)]
    assert drawn.count("a") / 4000 == pytest.approx(.514, abs=.025)
    assert sorted(draw(prompts, [], 4, 0, 0, 7, last, 50.)[0]) == prompts       # none twice
    assert draw(prompts, ["x"], 2, .5, 0, 7, last, 50.)[0] == ["a", "x"]
    del last["d"]
    assert draw(prompts, [], 2, 0, 0, 1, last, .5)[0] == draw(prompts, [], 2, 0, 0, 1)[0]


def test_a_prompts_own_seed_is_used_the_first_time():
    prompts = [Prompt("a", seed=7), Prompt("b")]
    picked, seeds = cycle_prompts(prompts, 5, 100)
    assert picked == ["a", "b", "a", "b", "a"] and seeds == [7, 101, 102, 103, 104]
    assert np.shape(seeds) == (5,)
