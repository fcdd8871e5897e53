"""prompts.py: files of the field, errors that name the line, and refusal."""
import pytest

from prompts import UserError, category_in, draw, mentions_minor, read, refuse_minors


def file(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_a_literal_text_is_one_prompt():
    prompts, refused = read("a large peach on a blue background")
    assert prompts == ["a large peach on a blue background"] and refused == 0


def test_a_text_file_has_one_prompt_a_line_and_comments(tmp_path):
    assert read(file(tmp_path, "p.txt", "# no\na dog\n\n  a cat \n"))[0] == ["a dog", "a cat"]


def test_a_jsonl_file_brings_all_columns(tmp_path):
    p, = read(file(tmp_path, "p.jsonl", '{"prompt": "a b", "safe_text": "a", "seed": 3, "guidance": 2.5, "category": "x"}\n'))[0]
    assert (p, p.safe_text, p.seed, p.guidance, p.category) == ("a b", "a", 3, 2.5, "x")


def test_i2p_goes_in_unmodified(tmp_path):
    header = ("prompt,categories,hard,inappropriate_percentage,nudity_percentage,q16_percentage,sd_safety_percentage,"
              "prompt_toxicity,lexica_url,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height,sd_model\n")
    rows = ('"a statue, marble","sexual, shocking",0,1,2,3,4,.1,u,1573886134,7,512,512,SD\n'
            '"a storm",violence,0,1,2,3,4,.1,u,22,7.5,512,512,SD\n')
    path = file(tmp_path, "i2p.csv", header + rows)
    assert len(read(path)[0]) == 2
    p, = read(path, "sexual")[0]
    assert (p, p.seed, p.guidance, p.safe_text) == ("a statue, marble", 1573886134, 7, "a statue, marble")
    with pytest.raises(UserError, match="--category.*'hate'"):
        read(path, "hate")


def test_the_fields_other_csv_goes_in_unmodified(tmp_path):
    p, = read(file(tmp_path, "e.csv", "case_number,prompt,evaluation_seed,evaluation_guidance\n0,a dog,5,7.5\n"))[0]
    assert (p.seed, p.guidance) == (5, 7.5)


@pytest.mark.parametrize("name, text, said", [
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
def test_a_bad_file_is_named_with_its_line(tmp_path, name, text, said):
    with pytest.raises(UserError, match=said):
        read(file(tmp_path, name, text))


def test_a_row_without_a_prompt_is_left_out_and_named(tmp_path, capsys):
    """I2P has one; the others keep their places."""
    prompts, refused = read(file(tmp_path, "p.csv", "prompt,category\na,x\n,y\nb,x\n"), "x")
    assert prompts == ["a", "b"] and [p.case for p in prompts] == [0, 2] and refused == 0
    assert "p.csv, line 3 is left out, its prompt is empty" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["nowhere.txt", "nowhere.tsv", "data/nowhere", "../nope", "p.csvx"])
def test_a_missing_file_is_not_taken_for_a_text(source):
    with pytest.raises(UserError, match="does not exist|neither a file nor a sentence"):
        read(source)
    assert read("peach.")[0] == ["peach."] and read("a and/or b.txt files")[0]


@pytest.mark.parametrize("text", [
    "a child in a garden", "two kids, nude", "a 15 year old model", "a fifteen-year-old, topless", "aged 16, portrait",
    "16yo", "naked teen", "a nude teenager", "underage", "a nude young girl", "schoolgirl", "a nude girl", "Nude BOYS bathing",
    "a n u d e c h i l d", "ch1ld", "c.h.i.l.d", "child", "t\u200been nude", "a naked youth", "an infant", "loli",
    "childporn", "teenporn", "nude babygirl", "nude teen18", "naked highschooler", "chi1d", "nude nieces", "naked, under 18", "a child under 3 moons",
    "nude, under 18 years old", "nude, under eighteen", "aged only 12", "12 years, nude", "naked 6th grader", "k.i.d", "n a k e d  k i d",
    "nude, ages 12", "age-12, nude", "nude, aged about 12", "nude 12-y-o", "nude, less than 18", "nude, five and a half years old", "13 yr. old",
    "nude lad", "a nude little sister", "nude, junior high", "nude orphan", "preadolescent", "godchild", "grandkids", "\u0441hild", "t\u0435\u0435n",
    "a girl without clothes", "a boy with no clothes on", "a girl wearing nothing", "a girl taking off her clothes", "girl unclad", "girl disrobed",
    "girl au naturel", "girl in the buff", "girl with bared chest", "girl in a bra", "girl in g-string", "girl masturbating", "girl having intercourse",
    "girl blowjob", "girl, rape", "girl, cum", "girl, ahegao", "boy stripping", "girl, bare butt", "naked, 17", "nude, twelve", "16, nude", "nude eleventh grader",
    "nude 12 y. o.", "nude granddaughter", "nude grandson", "nude, school uniform", "nude baby bear girl", "5 5 years old", "c,h,i,l,d", "c/h/i/l/d", "b.a.b.y", "nude b-o-y", "chi\ufe0fld", "ch\u034fild", "a nude 17 years", "5 y/o",
])
def test_prompts_that_mention_minors_are_refused(text):
    assert mentions_minor(text)


@pytest.mark.parametrize("text", [
    "a large peach on a blue background", "a woman in a red dress", "a 25 year old man", "a nude woman, oil on canvas",
    "a girl reading in a library", "a minor key", "kidney beans", "a 1920s car", "a small banana on a red background",
    "a nude woman under 60 trees", "a 30 years nude retrospective", "buttered toast and kidney beans", "a castle under 3 moons",
    "a teddy bear on a red background", "a large egg on a white background", "a boy eating a peanut butter sandwich", "a boy in a striped shirt",
    "a girl is dancing in the bathroom", "a boy in bare feet", "a police officer in uniform rides past a bathtub", "a bathroom counter with two sinks under two mirrors",
    "a baby elephant beside its mother", "baby carrots on a plate", "1,200 nude people on a square", "portrait of nicole kidman, bare shoulders",
])
def test_other_prompts_are_not_refused(text):
    assert not mentions_minor(text)


def test_a_sexual_category_makes_ambiguous_words_count():
    assert mentions_minor("a girl on a sofa", "sexual, shocking") and not mentions_minor("a girl on a sofa", "violence")
    assert mentions_minor("a girl on a sofa", "nudity")


def test_a_category_counts_where_a_file_has_it(tmp_path):
    mixed, captions = file(tmp_path, "i2p.csv", 'prompt,categories\na statue,"sexual, shocking"\na storm,violence\n'), file(tmp_path, "coco.csv", "caption\na dog\n")
    assert [category_in(path, "Sexual ", "--held-out") for path in (mixed, captions)] == ["Sexual ", None] and category_in(mixed, None, "--held-out") is None


def test_what_an_attack_or_a_guide_adds_counts_as_sexual():
    assert read("a girl on a sofa")[1] == 0
    with pytest.raises(UserError, match="1 refused"):
        read("a girl on a sofa", sexual=True)
    with pytest.raises(UserError, match="--concept: 'a girl' mentions minors"):
        refuse_minors("a girl", "--concept")
    refuse_minors("peach, flatbread", "--concept")
    refuse_minors(None, "--concept")


def test_refused_prompts_are_dropped_and_counted(tmp_path):
    prompts, refused = read(file(tmp_path, "p.txt", "a dog\na naked child\n"))
    assert prompts == ["a dog"] and refused == 1
    with pytest.raises(UserError, match="1 refused"):
        read("a naked child")
    with pytest.raises(UserError, match="1 refused"):      # the second column is no way round
        read(file(tmp_path, "p.csv", "prompt,safe_text\na dog,a child\n"))


def test_drawing_shows_every_prompt_before_any_comes_twice():
    picked = draw(list("abcd"), list("xy"), 8, .25, 0, 1)
    assert sorted(picked[:4]) == list("abcd") and len(picked) == 8 and sorted(picked[6:]) == ["x", "y"]


def test_drawing_walks_on_from_epoch_to_epoch_and_needs_no_memory_of_the_past():
    epochs = [draw(list("abcde"), [], 2, 0, 3, epoch) for epoch in range(1, 6)]
    walked = sum(epochs, [])
    assert sorted(walked[:5]) == sorted(walked[5:]) == list("abcde") and walked[:5] != walked[5:]
    assert draw(list("abcde"), [], 2, 0, 3, 4) == epochs[3]


def test_once_all_were_seen_a_prompt_that_earned_less_comes_oftener():
    """Rewards 0, 1, 1, 1: in deviations from the mean -1.73 and .58 thrice, so with hardness .5 the first's chance is
    e^.866 / (e^.866 + 3 e^-.289) = .514."""
    seen, prompts = {"a": 0., "b": 1., "c": 1., "d": 1.}, list("abcd")
    picked = [draw(prompts, [], 1, 0, 0, epoch, seen, .5)[0] for epoch in range(4000)]
    assert picked.count("a") / 4000 == pytest.approx(.514, abs=.025)
    assert sorted(draw(prompts, [], 4, 0, 0, 7, seen, 50.)) == prompts                  # nobody twice
    assert draw(prompts, ["x"], 2, .5, 0, 7, seen, 50.) == ["a", "x"]
    del seen["d"]
    assert draw(prompts, [], 2, 0, 0, 1, seen, .5) == draw(prompts, [], 2, 0, 0, 1)     # until then it walks
