"""prompts.py: files of the field, errors that name the line, what is drawn."""
import csv
import io
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from plumbing.options import UserError
from plumbing.remarks import check_guidance, name_long, refuse_shared, say_own, say_twice
from prompts import (
    COLUMNS,
    Prompt,
    category_in,
    cycle_prompts,
    draw,
    read,
    read_all,
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
    ("p.csv", f"prompt,seed\na,1{'0' * 400}\n", "line 2: seed is '1000.*a whole number from 0"),
    ("p.jsonl", '{"prompt": ["a", "b"]}\n', "line 1: prompt is .'a', 'b'., not a text"),
    ("p.csv", 'prompt,seed\n"two\nlines",1\na,1,9\n', "line 4.*more fields"),
    ("p.csv", "prompt,guidance\na,0\n", "line 2: guidance is '0'; 1 .none. or more is needed"),
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


@pytest.mark.parametrize("name, text, given", [
    ("a.csv", "\ufeffprompt,seed\r\na dog,5.0\r\n\r\na cat,\r\n", [("a dog", 5), ("a cat", None)]),
    ("b.csv", 'prompt,seed,,\n"a ""big"" dog\nand a cat",3,,\na fish\n',
     [('a "big" dog\nand a cat', 3), ("a fish", None)]),
    ("c.jsonl", '{"prompt": "a dog", "seed": 5.0}\n\n{"caption": "a \\u00f6", "seed": null}\n',
     [("a dog", 5), ("a ö", None)]),
    ("d.TXT", "a dog\r\r\na cat, # not a comment\n", [("a dog", None), ("a cat, # not a comment",
                                                                      None)])])
def test_the_odd_but_sound_forms_are_read_whole(tmp_path, name, text, given):
    path = tmp_path / name
    path.write_bytes(text.encode())
    assert [(str(p), p.seed) for p in read(str(path))[0]] == given


def usable(path):
    """What a file gives: prompts, or one sentence."""
    try:
        prompts, refused = read(path)
    except UserError as error:
        assert "\n" not in str(error) and str(error).startswith("--prompts: ")
        return
    assert prompts and refused >= 0
    for p in prompts:
        assert p.strip() == p != "" and p.encode() and p.safe_text
        assert p.seed is None or 0 <= p.seed < 2 ** 63
        assert type(p.case) is int and 0 <= p.case < 2 ** 63
        assert p.guidance is None or 1 <= p.guidance < np.inf


QUICK = settings(max_examples=60, deadline=None, derandomize=True,
                 suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = st.sampled_from(sorted({name for names in COLUMNS.values() for name in names} | {"x", ""}))
ODD = st.sampled_from(["", " ", "a dog", "5", "-5", "5.0", "1e3", "nan", "²", '"', "a,b", "\0",
                       "\ud800", "\u2028", "9" * 30, "{}", "0", "true"])
VALUES = ODD | st.text(max_size=8)


@QUICK
@given(content=st.binary(max_size=60), ending=st.sampled_from(["txt", "csv", "jsonl"]))
def test_any_bytes_are_prompts_or_one_sentence(tmp_path, content, ending):
    path = tmp_path / f"p.{ending}"
    path.write_bytes(content)
    usable(str(path))


@QUICK
@given(header=st.lists(NAMES, max_size=4), rows=st.lists(st.lists(VALUES, max_size=5), max_size=4))
def test_any_table_is_prompts_or_one_sentence(tmp_path, header, rows):
    text = io.StringIO()
    csv.writer(text).writerows([["prompt", *header], *rows])
    path = tmp_path / "p.csv"
    path.write_bytes(text.getvalue().encode(errors="surrogatepass"))
    usable(str(path))


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | VALUES,
                    lambda inner: st.lists(inner, max_size=2)
                    | st.dictionaries(VALUES, inner, max_size=2), max_leaves=4)


@QUICK
@given(rows=st.lists(st.dictionaries(NAMES, JSON, max_size=4) | JSON, max_size=3))
def test_any_json_is_prompts_or_one_sentence(tmp_path, rows):
    lines = [json.dumps({"prompt": "a dog", **row} if isinstance(row, dict) else row)
             for row in rows]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(lines))
    usable(str(path))


# ---- what is said of them ------------------------------------------------------------------------

def test_columns_that_other_tools_draw_by_are_named_once(tmp_path, capsys):
    rows = '"a statue, marble","sexual, shocking",0,1,2,3,4,.1,u,1573886134,7,512,768,SD\n'
    path = file(tmp_path, "i2p.csv", I2P_HEADER + rows)
    for _ in range(2):
        read(path)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "i2p.csv has columns that are passed over:" in error
    assert "sd_image_width (--resolution decides), sd_image_height (--resolution decides)" in error
    read(file(tmp_path, "empty.csv", "prompt,width,negative_prompt\na dog,,\n"))
    read(file(tmp_path, "mine.csv", "prompt,seed,category,note\na dog,1,x,y\n"))
    assert capsys.readouterr().err == ""
    read(file(tmp_path, "web.jsonl", '{"prompt": "a dog", "cfg_scale": 7, "negative_prompt": "x"}'))
    error = capsys.readouterr().err
    assert "cfg_scale (--guidance, or a column guidance decides)" in error
    assert "negative_prompt (--method negative:WORDS decides)" in error


def test_a_text_that_is_to_become_safe_and_to_stay_is_refused_by_its_name():
    with pytest.raises(UserError, match="--benign: .* is among --prompts, too"):
        refuse_shared(["caf\u00e9"], ["cafe\u0301"])
    refuse_shared(["a dog"], ["a cat"])
    for other in ("a dog", "A  dog "):
        with pytest.raises(UserError, match="--benign: 'A? *.* is among --prompts, too .1 such"):
            refuse_shared(["a dog"], ["a cat", other])


def test_prompts_longer_than_the_text_encoder_are_named(pipeline, capsys):
    tokenizer = CLIPTokenizer.from_pretrained(f"{pipeline}/tokenizer")
    texts = ["a dog", "a dog " * 30, "a cat " * 40, Prompt("a fish " * 40, states=("f", "0", ""))]
    name_long(texts, tokenizer, 24, "mine.csv")
    name_long(texts, tokenizer, 24, "mine.csv")
    assert capsys.readouterr().err == (
        "mine.csv: 2 of 3 prompts are longer than the 24 tokens of this text encoder and are cut, "
        "'a dog a dog a dog a dog a dog a dog a do…' the first\n")
    name_long(["a dog"] * 9, tokenizer, 24)
    name_long([], tokenizer, 24)
    assert capsys.readouterr().err == ""


# ---- drawing -------------------------------------------------------------------------------------

def test_drawing_shows_every_prompt_before_any_comes_twice():
    drawn, is_benign = draw(list("abcd"), list("xy"), 8, 1, .25, 0, 1)
    assert sorted(drawn[:4]) == list("abcd") and len(drawn) == 8 and sorted(drawn[6:]) == ["x", "y"]
    assert is_benign.tolist() == [False] * 6 + [True] * 2


def test_prompts_to_make_safe_come_in_groups_and_benign_ones_once_each():
    drawn, is_benign = draw(list("abcd"), list("uvwxyz"), 4, 3, .5, 0, 1)
    assert drawn[:3].tolist() == [drawn[0]] * 3 and drawn[3:6].tolist() == [drawn[3]] * 3
    assert drawn[0] != drawn[3] and sorted(drawn[6:]) == list("uvwxyz")
    assert is_benign.tolist() == [False] * 6 + [True] * 6


def test_drawing_walks_on_from_epoch_to_epoch_and_needs_no_memory_of_the_past():
    epochs = [draw(list("abcde"), [], 2, 1, 0, 3, epoch)[0].tolist() for epoch in range(1, 6)]
    walked = sum(epochs, [])
    assert sorted(walked[:5]) == sorted(walked[5:]) == list("abcde") and walked[:5] != walked[5:]
    assert draw(list("abcde"), [], 2, 1, 0, 3, 4)[0].tolist() == epochs[3]


def test_once_all_were_seen_a_prompt_with_low_rewards_comes_more_often():
    """Rewards 0, 1, 1, 1: in deviations from the mean -1.73 and .58 three times, so that with
    hardness .5 the first's chance is e^.866 / (e^.866 + 3 e^-.289) = .514."""
    last, prompts = {"a": 0., "b": 1., "c": 1., "d": 1.}, list("abcd")
    drawn = [draw(prompts, [], 1, 1, 0, 0, epoch, last, .5)[0][0] for epoch in range(4000)]
    assert drawn.count("a") / 4000 == pytest.approx(.514, abs=.025)
    assert sorted(draw(prompts, [], 4, 1, 0, 0, 7, last, 50.)[0]) == prompts       # none twice
    assert draw(prompts, ["x"], 2, 1, .5, 0, 7, last, 50.)[0].tolist() == ["a", "x"]
    del last["d"]
    first = [draw(prompts, [], 2, 1, 0, 0, 1, *rest)[0].tolist() for rest in ((last, .5), ())]
    assert first[0] == first[1]


def test_a_prompts_own_seed_is_used_the_first_time():
    prompts = [Prompt("a", seed=7), Prompt("b")]
    picked, seeds = cycle_prompts(prompts, 5, 100)
    assert picked == ["a", "b", "a", "b", "a"] and seeds == [7, 101, 102, 103, 104]
    assert np.shape(seeds) == (5,)


def test_what_prompts_bring_of_their_own_is_said(capsys):
    say_own([Prompt("a dog", seed=1), Prompt("a cat", seed=2, guidance=3.)], "i2p.csv")
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "i2p.csv: 2 of 2 prompts bring a seed of their own, which goes before --seed",
        "i2p.csv: 1 of 2 prompts bring a guidance of their own, which goes before --guidance"]


def test_rows_that_give_the_same_picture_are_said(capsys):
    first, third = Prompt("a dog", seed=1), Prompt("a dog", seed=3)
    say_twice([first, Prompt("a dog", seed=2), third, Prompt("a dog", seed=1, guidance=2.), first,
               Prompt("a dog"), Prompt("a dog")], "p.csv")
    assert capsys.readouterr().err == ""
    say_twice([first, Prompt("A  dog", seed=1), third], "p.csv")
    assert "p.csv: 2 rows have the text and the seed of another one" in capsys.readouterr().err


def test_a_guidance_of_1_beside_a_negative_prompt_is_looked_for_in_the_prompts(capsys):
    high, low, bare = Prompt("a", guidance=7.), Prompt("b", guidance=1.), Prompt("c")
    check_guidance([high], 1., {"negative"})            # what the option says is not used
    check_guidance([bare, low], 1., {"plain"})
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="--guidance: 1 leaves the negative prompt out"):
        check_guidance([bare, low], 1., {"negative"})
    check_guidance([high, low], 7., {"plain", "negative"})
    assert "--guidance: 1 of 2 pictures have 1, which leaves the neg" in capsys.readouterr().err
