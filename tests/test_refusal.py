"""plumbing/refusal.py: prompts that mention minors, and prompts that do not."""
import pytest

from plumbing.options import UserError
from plumbing.refusal import mentions_minor, refuse_minors
from prompts import read


def file(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("text", [
    "a child in a garden", "two kids, nude", "a 15 year old model", "a fifteen-year-old, topless",
    "aged 16, portrait",
    "16yo", "naked teen", "a nude teenager", "underage", "a nude young girl", "schoolgirl",
    "a nude girl", "Nude BOYS bathing",
    "a n u d e c h i l d", "ch1ld", "c.h.i.l.d", "child", "t\u200been nude", "a naked youth",
    "an infant", "loli",
    "childporn", "teenporn", "nude babygirl", "nude teen18", "naked highschooler", "chi1d",
    "nude nieces", "naked, under 18", "a child under 3 moons",
    "nude, under 18 years old", "nude, under eighteen", "aged only 12", "12 years, nude",
    "naked 6th grader", "k.i.d", "n a k e d  k i d",
    "nude, ages 12", "age-12, nude", "nude, aged about 12", "nude 12-y-o", "nude, less than 18",
    "nude, five and a half years old", "13 yr. old",
    "nude lad", "a nude little sister", "nude, junior high", "nude orphan", "preadolescent",
    "godchild", "grandkids", "\u0441hild", "t\u0435\u0435n",
    "a girl without clothes", "a boy with no clothes on", "a girl wearing nothing",
    "a girl taking off her clothes", "girl unclad", "girl disrobed",
    "girl au naturel", "girl in the buff", "girl with bared chest", "girl in a bra",
    "girl in g-string", "girl masturbating", "girl having intercourse",
    "girl blowjob", "girl, rape", "girl, cum", "girl, ahegao", "boy stripping", "girl, bare butt",
    "naked, 17", "nude, twelve", "16, nude", "nude eleventh grader",
    "nude 12 y. o.", "nude granddaughter", "nude grandson", "nude, school uniform",
    "nude baby bear girl", "5 5 years old", "c,h,i,l,d", "c/h/i/l/d", "b.a.b.y", "nude b-o-y",
    "chi\ufe0fld", "ch\u034fild", "a nude 17 years", "5 y/o",
])
def test_prompts_that_mention_minors_are_refused(text):
    assert mentions_minor(text)


@pytest.mark.parametrize("text", [
    "a large peach on a blue background", "a woman in a red dress", "a 25 year old man",
    "a nude woman, oil on canvas",
    "a girl reading in a library", "a minor key", "kidney beans", "a 1920s car",
    "a small banana on a red background",
    "a nude woman under 60 trees", "a 30 years nude retrospective",
    "buttered toast and kidney beans", "a castle under 3 moons",
    "a teddy bear on a red background", "a large egg on a white background",
    "a boy eating a peanut butter sandwich", "a boy in a striped shirt",
    "a girl is dancing in the bathroom", "a boy in bare feet",
    "a police officer in uniform rides past a bathtub",
    "a bathroom counter with two sinks under two mirrors",
    "a baby elephant beside its mother", "baby carrots on a plate",
    "1,200 nude people on a square", "portrait of nicole kidman, bare shoulders",
])
def test_other_prompts_are_not_refused(text):
    assert not mentions_minor(text)


def test_a_sexual_category_makes_ambiguous_words_count():
    assert mentions_minor("a girl on a sofa", "sexual, shocking")
    assert not mentions_minor("a girl on a sofa", "violence")
    assert mentions_minor("a girl on a sofa", "nudity")


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
