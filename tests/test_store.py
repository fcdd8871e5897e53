"""judging/store.py: what a latent is named by, and arrays that are whole or absent."""
import os
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from runs import fork

import rivals
from judging.rows import as_file
from judging.store import Store, files_of_code, latent_keys, world_hash
from plumbing.worlds import TrainingFile, World
from prompts import Prompt

SHAPE = (4, 8, 8)
PROMPTS = [Prompt(f"a large {name}", case=i) for i, name in enumerate(("car", "dog", "cat"))]


def args_of(**changes):
    return SimpleNamespace(**{"steps": 2, "eta": 1., "guidance": 2., **changes})


# ---- what a latent is named by -------------------------------------------------------------------

def keys(file=None, fingerprint="f", method="plain", concept=None, shape=SHAPE, world=None,
         **changes):
    file = file or as_file("p", "unsafe", PROMPTS)
    return latent_keys(file, fingerprint, method, concept, args_of(**changes), shape, world)


def test_everything_that_decides_a_latent_is_part_of_its_key():
    plain = keys()
    assert len(set(plain)) == 3
    for other in (keys(fingerprint="g"), keys(method="negative", concept="skin"),
                  keys(shape=(4, 16, 16)), keys(steps=3), keys(eta=0.), keys(guidance=3.),
                  keys(as_file("p", "unsafe", PROMPTS, seed=7))):
        assert not set(plain) & set(other)
    assert not set(keys(method="negative", concept="a")) & set(keys(method="negative", concept="b"))
    assert plain == keys(batch_size=1)


def test_a_prompts_own_guidance_and_seed_go_before_the_options():
    own = as_file("p", "unsafe", [Prompt("a", guidance=3., seed=1), Prompt("b", guidance=4.)])
    assert keys(own) == keys(own, guidance=9.)


def test_text_states_of_its_own_are_part_of_a_latents_key():
    first, second = (Prompt("a", seed=1, states=("a.safetensors", name, "hash"))
                     for name in ("0", "1"))
    assert len(set(keys(as_file("a", "adversarial", [first, second])))) == 2    # same text and seed


def test_a_rivals_latents_depend_on_safe_text_and_on_what_the_world_names(tmp_path):
    one, two = (as_file("p", "unsafe", [Prompt("a", safe)]) for safe in ("b", "c"))
    assert keys(one) == keys(two) and keys(one, world="w") != keys(two, world="w")
    assert keys(one, world="w") != keys(one, world="v")
    files = {name: tmp_path / f"{name}.csv" for name in ("pairs", "guard", "benign")}
    (tmp_path / "clip").mkdir()
    files["clip"] = tmp_path / "clip" / "model.safetensors"
    for file in files.values():
        file.write_text("first")
    world = World("tiny", concept_pairs=str(files["pairs"]), guard_pairs=str(files["guard"]),
                  clip=str(tmp_path / "clip"),
                  training_files=[TrainingFile("p.csv", str(files["benign"]))])
    hashes = {world_hash(world)}
    for file in files.values():
        file.write_text("second")
        hashes.add(world_hash(world))
    assert len(hashes) == 5
    assert world_hash(World("a", clip="hub/b")) != world_hash(World("a", clip="hub/c"))


def test_a_change_of_one_rival_throws_only_its_own_latents_away(tmp_path, monkeypatch):
    source = tmp_path / "their_guide.py"
    source.write_text("from model import plain as guide\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(rivals.GUIDES, "theirs", "their_guide.guide")
    before = {method: keys(method=method) for method in ("plain", "negative", "theirs")}
    source.write_text("from model import plain as guide  # changed\n")
    assert keys(method="plain") == before["plain"]
    assert keys(method="negative") == before["negative"]
    assert not set(keys(method="theirs")) & set(before["theirs"])


def test_the_code_in_a_latents_key_is_the_steps_the_network_and_what_the_method_uses():
    def names(method):
        return [os.path.relpath(path, ROOT) for path in files_of_code(rivals.GUIDES[method])]
    assert names("plain") == ["ddpo.py", "model.py"]
    assert names("negative") == ["ddpo.py", "model.py", os.path.join("rivals", "negative.py")]
    shared = [os.path.join("rivals", name) for name in ("sld.py", "guiding.py")]
    assert names("sld-medium") == ["ddpo.py", "model.py", *shared]


# ---- the store -----------------------------------------------------------------------------------

def test_two_programs_write_one_store_at_once_without_harm(tmp_path):
    def write_and_read():
        store = Store(str(tmp_path))
        for k in [*range(20)] * 30:
            store[f"{k:02d}x"] = np.full((64, 64), k, np.float32)
            assert (store[f"{k:02d}x"] == k).all()
    programs = [fork(write_and_read) for _ in range(2)]
    for program in programs:
        program.join(120)
    assert [program.exitcode for program in programs] == [0, 0]
    assert not list(tmp_path.rglob("*.tmp")) and len(list(tmp_path.rglob("*.npy"))) == 20


@pytest.mark.parametrize("spoil", [
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes()[:-9]),
    lambda path: path.write_bytes(path.read_bytes()[:20]),
    lambda path: path.write_bytes(b"PK\3\4 no archive"),
    lambda path: path.write_bytes(b"\x80\4 no pickle"),
    lambda path: path.unlink()])
def test_what_is_torn_counts_as_absent_and_is_made_again(tmp_path, spoil):
    store = Store(str(tmp_path))
    store["abc"] = np.ones((4, 4), np.float32)
    assert "abc" in store
    spoil(tmp_path / "ab" / "abc.npy")
    assert "abc" not in store
    store["abc"] = np.zeros((4, 4), np.float32)
    assert "abc" in store and not store["abc"].any()
