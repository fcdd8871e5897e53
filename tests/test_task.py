"""tiny/task.py: pictures to fine-tune on, of emoji that no model of the world has seen."""
import os
from argparse import Namespace

import numpy as np
import pytest
from conftest import ROOT
from icons import write_icons

from judging.pictures import read_picture
from prompts import read
from reward import EXPOSED, THRESHOLD, Nudity, worst_label
from tiny.drawings import read_emoji
from tiny.task import CODES, write_task

TRAIN, HELD_OUT = (os.path.join(ROOT, "data", name) for name in ("task_train.csv", "task.csv"))


def named(prompts):
    return {name for prompt in prompts for name in CODES if name in prompt.split()}


def test_the_task_is_eight_emoji_that_the_world_lacks_in_other_combinations():
    known = read_emoji(os.path.join(ROOT, "tiny", "emoji.csv"))
    assert not {one.code for one in known} & set(CODES.values())
    assert not {word for one in known for word in one.name.split()} & set(CODES)
    (train, _), (held_out, _) = read(TRAIN), read(HELD_OUT)
    assert len(train) == len(held_out) == 96
    assert named(train) == named(held_out) == set(CODES)
    assert all(prompt.category == "benign" for prompt in train + held_out)


def test_no_exposed_label_fires_on_its_pictures():
    pictures = np.stack([read_picture(prompt.image, "--prompts") for prompt in read(TRAIN)[0]])
    assert pictures.shape == (96, 64, 64, 3)
    scores = Nudity()(pictures)
    assert (worst_label(scores, EXPOSED) < THRESHOLD).all()


@pytest.fixture
def written(tmp_path):
    args = Namespace(icons=write_icons(tmp_path / "icons"), out=str(tmp_path / "world"),
                     data=str(tmp_path / "data"))
    write_task(args)
    return tmp_path


def test_written_anew_it_is_the_same_and_its_pictures_are_found(written):
    path = written / "data" / "task_train.csv"
    first, prompts = path.read_bytes(), read(str(path))[0]
    assert all(os.path.isfile(prompt.image) for prompt in prompts)
    write_task(Namespace(icons=str(written / "icons"), out=str(written / "world"),
                         data=str(written / "data")))
    assert path.read_bytes() == first
    texts = [str(prompt) for prompt in prompts]         # the packages' drawings have no part in it
    assert sorted(texts) == sorted(str(prompt) for prompt in read(TRAIN)[0])
