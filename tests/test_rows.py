"""judging/rows.py: files, systems and their names, pictures drawn."""
import json
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import rivals
from judging import rows
from judging.pictures import replace_own
from judging.rows import (
    Row,
    System,
    as_file,
    check_parts,
    draw_row,
    folder_row,
    has_weights,
    load_system,
    name_of,
    open_file,
    parse_system,
    with_names,
    with_words,
)
from judging.store import Store
from model import Policy
from plumbing.options import UserError
from prompts import Prompt

ARGS = SimpleNamespace(steps=2, eta=1., guidance=2., resolution=None, batch_size=3, concept=None)
SHAPE = (4, 8, 8)
PROMPTS = [Prompt(f"a large {name}", case=i) for i, name in enumerate(("car", "dog", "cat"))]


def args_of(**changes):
    return SimpleNamespace(**{**vars(ARGS), **changes})


# ---- files ---------------------------------------------------------------------------------------

def test_a_file_is_benign_if_all_its_rows_are_and_else_unsafe(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("prompt,category\na dog,benign\na cat,benign\n")
    file = open_file(str(path))
    assert file.kind == "benign" and file.name == "p.csv" and file.source == str(path)
    path.write_text("prompt,category\na dog,benign\na cat,unsafe\n")
    assert open_file(str(path)).kind == "unsafe"
    path.write_text("prompt\na dog\n")
    assert open_file(str(path)).kind == "unsafe"
    assert open_file(str(path), "adversarial").kind == "adversarial"


def test_the_prompts_of_a_file_come_in_turn_each_with_a_seed_of_its_own():
    file = as_file("p", "unsafe", [Prompt("a", seed=5), Prompt("b")], 5, seed=100)
    assert file.prompts == ["a", "b", "a", "b", "a"] and file.prompt_count == 2
    assert file.seeds == [5, 101, 102, 103, 104] and file.groups.tolist() == [0, 1, 0, 1, 0]
    assert file.about["pictures"] == 5 and file.about["prompts"] == 2
    other = as_file("p", "unsafe", [Prompt("a", seed=6), Prompt("b")], 5, seed=100)
    assert other.sha256 != file.sha256


def test_what_the_text_encoder_reads_alike_is_one_prompt():
    texts = ["a dog", "A  DOG", "caf\u00e9", "cafe\u0301", "a dog."]
    assert as_file("p", "unsafe", [*map(Prompt, texts)]).groups.tolist() == [0, 0, 1, 1, 2]


def test_a_name_that_is_no_utf_8_is_spelled_out(tmp_path):
    name = b"p\xe9".decode(errors="surrogateescape")
    path = tmp_path / f"{name}.txt"
    path.write_text("a dog\n")
    file = open_file(str(path))
    assert file.name == r"p\udce9.txt" and file.source == str(path)
    folder = tmp_path / name
    folder.mkdir()
    Image.fromarray(np.eye(64, dtype=np.uint8)).save(folder / "0.png")
    assert folder_row(f"{folder}/", {file.name: file}).name == name_of(folder) == r"p\udce9"
    system, = with_names([System(((str(folder), 1.),))])
    assert system.name == r"p\udce9" and system.checkpoint == str(folder)


# ---- systems -------------------------------------------------------------------------------------

def test_a_checkpoint_names_its_own_method():
    def parsed(text):
        system, = parse_system(text)
        return system.checkpoint, system.method, system.concept
    assert parsed("out/a+sld-medium") == ("out/a", "sld-medium", "")
    assert parsed("base+negative") == ("base", "negative", "")
    assert parsed("base+negative:brown, round") == ("base", "negative", "brown, round")
    assert parsed("out/a") == ("out/a", "plain", "")
    assert parsed("out/a+out/b@0.5") == ("out/a+out/b@0.5", "plain", "")
    assert parsed("out/a@0.25+out/b+sld-max:x") == ("out/a@0.25+out/b", "sld-max", "x")


def test_weights_belong_to_their_parts_whether_or_not_these_are_there(tmp_path):
    for present in ((), ("a",), ("a", "b")):
        for name in present:
            (tmp_path / name).mkdir(exist_ok=True)
        system, = parse_system(f"{tmp_path}/a@0.25+{tmp_path}/b")
        assert system.parts == ((f"{tmp_path}/a", .25), (f"{tmp_path}/b", 1.))


def test_a_checkpoint_without_a_method_is_drawn_by_each_that_is_asked_for():
    systems = parse_system("out/a", ["plain", "negative:skin"])
    assert [(s.method, s.concept) for s in systems] == [("plain", ""), ("negative", "skin")]
    assert parse_system("base+plain") == [System()]


@pytest.mark.parametrize("text, methods, message", [
    ("base+negative:child", [], "--checkpoint: 'child' mentions minors"),
    ("base", ["negative:child"], "--method: 'child' mentions minors"),
    ("base", ["magic"], "--method: magic is unknown; give one of plain, negative"),
    ("base", ["plain:peach"], "--method: plain guidance steers away from nothing; leave 'peach'"),
    ("base+plain:peach", [], "--checkpoint: plain guidance steers away from nothing"),
    ("out/a@x", [], "--checkpoint: out/a@x has the weight 'x'")])
def test_a_mistake_in_a_system_is_one_sentence(text, methods, message):
    with pytest.raises(UserError, match=message):
        parse_system(text, methods)


def test_a_system_is_named_after_its_folders_or_by_its_paths_where_that_name_is_taken():
    systems = [System(), *parse_system("x/a"), *parse_system("y/a"), *parse_system("x/a+y/b@0.5"),
               *parse_system("x/a+sld-max:skin"), *parse_system("base+negative")]
    names = [system.name for system in with_names(systems)]
    assert names == ["base", "a", "y/a", "a + b@0.5", "a + sld-max:skin", "base + negative"]
    with pytest.raises(UserError, match="two are named base; rename a folder"):
        with_names([System()], taken=["base"])
    with pytest.raises(UserError, match="two are named theirs"):
        with_names([System()], taken=["theirs", "theirs"])


@pytest.fixture(scope="module")
def lora(pipeline, tmp_path_factory):
    """A fine-tuned checkpoint beside the random pipeline."""
    folder = str(tmp_path_factory.mktemp("lora"))
    policy = Policy(pipeline, trainable=True)
    policy.make_trainable("lora")
    policy.save(folder, "card")
    return folder


def test_parts_without_weights_are_refused_before_anything_is_drawn(pipeline, lora, tmp_path):
    (tmp_path / "empty").mkdir()
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(b"torn")
    fits = System(((lora, .5),))
    check_parts([System(), fits], pipeline)
    for path in (tmp_path / "empty", tmp_path / "nowhere", torn):
        with pytest.raises(UserError, match=f"--checkpoint: {path}"):
            check_parts([fits, System(((lora, 1.), (str(path), 1.)))], pipeline)
    assert has_weights(str(torn)) and not has_weights(str(tmp_path / "empty"))


def test_a_base_is_what_it_is_and_not_how_its_path_was_written(
        pipeline, lora, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(lora, run)
    system = System(((str(run), 1.),))

    def trained_on(model):
        (run / "args.json").write_text(json.dumps({"model": str(model)}))
    for written in (pipeline, f"{pipeline}/", os.path.join(pipeline, "unet", "..")):
        trained_on(written)
        check_parts([system], pipeline)
    os.symlink(pipeline, tmp_path / "link")
    shutil.copytree(pipeline, tmp_path / "copy")
    for same in ("link", "copy"):
        trained_on(tmp_path / same)
        check_parts([system], pipeline)
    trained_on("somewhere/else")
    with pytest.raises(UserError, match="was trained on somewhere/else, not on .*; a table"):
        check_parts([system], pipeline)
    assert capsys.readouterr().err == ""
    check_parts([system], pipeline, is_given=True)      # the user says so
    assert "was trained on somewhere/else, not on" in capsys.readouterr().err


# ---- drawing -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def policy(pipeline):
    return Policy(pipeline)


def drawn(policy, system, store, args=ARGS, count=5):
    file = as_file("p", "unsafe", PROMPTS, count)
    row = draw_row(replace(system, name="row"), policy, {"p": file}, store, args, policy.decode)
    return row, row.look(file, 0)


def test_a_row_gives_its_pictures_a_block_at_a_time(policy):
    file, store = as_file("p", "unsafe", PROMPTS, rows.CHUNK + 3), {}
    row = draw_row(System(name="base"), policy, {"p": file}, store, ARGS, policy.decode)
    assert row.look(file, 0).shape == (rows.CHUNK, 64, 64, 3)
    assert len(row.look(file, rows.CHUNK)) == 3 and row.blocked == {}
    assert row.about == {"checkpoint": None, "method": "plain", "sha256": policy.fingerprint()}


def test_latents_of_another_shape_or_torn_ones_are_drawn_again(policy, tmp_path):
    store = Store(str(tmp_path))
    _, pictures = drawn(policy, System(), store)
    first, second, *_ = sorted(tmp_path.rglob("*.npy"))
    np.save(first, np.zeros((4, 16, 16), np.float32))
    second.write_bytes(b"")
    assert np.array_equal(drawn(policy, System(), store)[1], pictures)


def test_the_blocks_used_last_are_remembered_up_to_a_size(monkeypatch):
    monkeypatch.setattr(rows, "DECODED", {})
    monkeypatch.setattr(rows, "DECODED_BYTES", 30)
    store, asked = {name: np.full(4, i, np.float32) for i, name in enumerate("abcd")}, []

    def look(keys):
        def decode(latents):
            asked.append(keys)
            return latents.to(torch.uint8)
        return rows.decoded(tuple(keys), store, decode).tolist()
    assert look("ab") == [[0] * 4, [1] * 4] and look("c") == [[2] * 4]
    for keys in ("d", "cd", "ab", "a", "bc"):
        look(keys)                                      # 8, 4, 4, 8, 8, 4 and 8 bytes: "c" is gone
    assert asked == ["ab", "c", "d", "cd", "a", "bc"]
    look("ab")
    look("c")
    assert asked[-1] == "c" and asked.count("ab") == 1


def test_a_latent_that_is_not_finite_is_black(policy):
    store = {}
    _, pictures = drawn(policy, System(), store)
    key = list(store)[1]
    for value in (np.nan, np.inf):
        store[key][0, 0, 0] = value
        _, shown = drawn(policy, System(), store)
        assert not shown[1].any() and np.array_equal(shown[2:], pictures[2:])
        assert np.array_equal(shown[0], pictures[0])


def test_without_noise_pictures_can_be_drawn_too(policy):
    _, pictures = drawn(policy, System(), {}, args_of(eta=0.))
    assert not np.array_equal(pictures, drawn(policy, System(), {})[1])


def test_a_systems_words_go_before_the_options_and_those_before_the_models(pipeline):
    def concept(words, option, method="negative", models="c"):
        system = System(method=method, concept=words)
        return with_words([system], option, SimpleNamespace(concept=models))[0].concept
    assert concept("a", "b") == "a" and concept("", "b") == "b" and concept(" ,", None) == "c"
    assert concept("", "b", method="plain") == "" == concept("", None, "plain", models="")
    with pytest.raises(UserError, match="--concept: safree needs words .* world.json has none"):
        concept("", None, "safree", models=",")
    system = System(method="negative", concept="a")
    assert load_system(system, pipeline, "cpu", "fp32").concept == "a"
    assert load_system(System(), pipeline, "cpu", "fp32").concept == "peach, egg"


def half_way(policy, prompts, noise, schedule, scale, start=0):
    """A sampler: the noise itself, halved, so that one sees who drew."""
    return noise[:, 0] / 2


ASKED = []


def no_dogs(policy, prompts, noise, draw, pictures):
    """A blocker: dogs before drawing, the first picture of each batch after it."""
    ASKED.append(None if pictures is None else len(pictures))
    if pictures is None:
        return np.array(["dog" in prompt for prompt in prompts])
    assert np.abs(draw(prompts, noise).astype(int) - pictures).max() <= 1
    return np.arange(len(prompts)) == 0


@pytest.fixture
def registered(monkeypatch):
    """A sampler and a blocker of the tests', by name."""
    monkeypatch.setitem(rivals.SAMPLERS, "half", f"{__name__}.half_way")
    monkeypatch.setitem(rivals.BLOCKERS, "no-dogs", f"{__name__}.no_dogs")
    ASKED.clear()


def test_a_sampler_draws_under_a_name_of_its_own(policy, registered):
    store = {}
    drawn(policy, System(), store)
    row, _ = drawn(policy, System(method="half"), store)
    assert row.about["method"] == "half" and row.about["concept"] == policy.concept
    assert len(store) == 10                             # nothing is taken for another's
    noise = rows.draw_latents(policy, half_way, PROMPTS, [rows.FIRST_SEED + i for i in range(3)],
                              policy.schedule(2), 2.)
    assert any(np.array_equal(noise[0].numpy(), latent) for latent in store.values())


def test_a_blocker_is_asked_before_and_after_and_its_pictures_are_black(policy, registered):
    store = {}
    _, plain = drawn(policy, System(), store)
    row, pictures = drawn(policy, System(method="no-dogs"), store)
    assert ASKED == [None, 3, None, 2]                  # batches of 3 and 2 pictures
    blocked = row.blocked["p"]
    assert blocked.tolist() == [True, True, False, True, True]      # the firsts, and two dogs
    assert (pictures[blocked] == 0).all()
    assert np.array_equal(pictures[~blocked], plain[~blocked])
    assert len(store) == 10                             # the base's latents, five answers


def test_a_blockers_answers_are_kept(policy, registered, monkeypatch):
    store = {}
    first, _ = drawn(policy, System(method="no-dogs"), store)
    monkeypatch.setattr(rows, "blocked_pictures", None)             # whoever asks now fails
    monkeypatch.setattr(rows, "draw_latents", None)                 # whoever draws now fails
    again, _ = drawn(policy, System(method="no-dogs"), store)
    assert np.array_equal(again.blocked["p"], first.blocked["p"])
    monkeypatch.setattr(policy, "concept", "other words")
    with pytest.raises(TypeError):
        drawn(policy, System(method="no-dogs"), store)


def test_a_row_keeps_no_policy_in_memory(pipeline):
    import gc
    import weakref
    policy, decoder = Policy(pipeline), Policy(pipeline)
    file = as_file("p", "unsafe", PROMPTS)
    row = draw_row(System(name="a"), policy, {"p": file}, {}, ARGS, decoder.decode)
    gone = weakref.ref(policy)
    del policy
    gc.collect()
    assert gone() is None and len(row.look(file, 0)) == 3


# ---- another tool's pictures ---------------------------------------------------------------------

def save_pictures(folder, names, size=64):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        Image.fromarray(np.full((size, size, 3), 10 * i, np.uint8)).save(folder / name)


def shades(row, file):
    return row.look(file, 0)[:, 0, 0, 0].tolist()


def test_pictures_are_found_by_case_number_and_turn(tmp_path):
    file = as_file("p.csv", "unsafe", [Prompt("a", case=3), Prompt("b", case=12)], 4)
    save_pictures(tmp_path / "x", ["3_0.png", "3_1.png", "0012_0.png", "12_1.jpg"])
    row = folder_row(str(tmp_path / "x"), {"p.csv": file})
    assert isinstance(row, Row) and row.name == "x"
    assert shades(row, file) == [0, 20, 10, 30]
    twice = as_file("p.csv", "unsafe", [Prompt("a", case=3), Prompt("b", case=3)])
    row = folder_row(str(tmp_path / "x"), {"p.csv": twice})         # rows that share a number
    assert shades(row, twice) == [0, 10]


def test_of_several_files_each_has_a_folder_of_its_own(tmp_path):
    files = {name: as_file(name, "unsafe", [Prompt("a", case=0)]) for name in ("p.csv", "q.txt")}
    save_pictures(tmp_path / "x" / "p", ["0.png"])
    with pytest.raises(UserError, match="x/q is no folder; with several"):
        folder_row(str(tmp_path / "x"), files)
    save_pictures(tmp_path / "x" / "q", ["1.png", "0.png"])
    row = folder_row(str(tmp_path / "x"), files)
    assert [shades(row, file) for file in files.values()] == [[0], [10]]


def leave_empty(folder):
    folder.mkdir()


def leave_one_out(folder):
    save_pictures(folder, ["0.png"])


def tear_one(folder):
    save_pictures(folder, ["0.png", "1.png"])
    (folder / "1.png").write_bytes(b"torn")


def shrink_one(folder):
    save_pictures(folder, ["0.png"])
    save_pictures(folder, ["1.png"], 32)


def draw_other(folder, **about):
    """What sample.py leaves, of another prompt for case 1."""
    save_pictures(folder, ["0.png", "1.png"])
    replace_own(str(folder), {"0.png": {"prompt": "a"}, "1.png": {"prompt": "c", **about}})
    save_pictures(folder, ["0.png", "1.png"])


def pixelate_one(folder):
    draw_other(folder, prompt="b", pixelated=True)


@pytest.mark.parametrize("spoil, message", [
    (leave_empty, "holds no picture named by case number"),
    (leave_one_out, "lacks 1 of the 2 pictures that p.csv asks for, case 1 the first"),
    (tear_one, "1.png is no readable picture"),
    (shrink_one, "1.png is 32 x 32 pixels, others are 64 x 64; one size is needed"),
    (draw_other, "1.png was drawn of 'c', and p.csv has 'b' there"),
    (pixelate_one, "1.png was pixelated by sample.py and would count as safe; draw it anew")])
def test_what_is_wrong_with_a_folder_of_pictures_is_said_before_it_is_looked_at(
        tmp_path, spoil, message):
    file = as_file("p.csv", "unsafe", [Prompt("a", case=0), Prompt("b", case=1)])
    spoil(tmp_path / "x")
    with pytest.raises(UserError, match=message):
        folder_row(str(tmp_path / "x"), {"p.csv": file})


def test_what_sample_blocked_is_blocked_in_the_table_too(tmp_path):
    file = as_file("p.csv", "unsafe", [Prompt("a", case=0), Prompt("b", case=1)])
    draw_other(tmp_path / "x", prompt="b", blocked=True)
    row = folder_row(str(tmp_path / "x"), {"p.csv": file})
    assert row.blocked["p.csv"].tolist() == [False, True]


def test_latents_are_kept_on_the_cpu_as_float32(policy):
    store = {}
    drawn(policy, System(), store)
    assert {latent.dtype for latent in store.values()} == {np.dtype(np.float32)}
    assert torch.from_numpy(next(iter(store.values()))).shape == SHAPE
