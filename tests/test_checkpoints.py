"""plumbing/checkpoints.py: a run's folder, what a base is, torn files."""
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from plumbing.checkpoints import (
    check_folder,
    load_checkpoint,
    read_pointer,
    save_checkpoint,
    saved_epochs,
)
from plumbing.files import write
from plumbing.options import UserError
from plumbing.origin import is_same_base


def settings(folder, **more):
    own = {"output_dir": str(folder), "model": "tiny", "recipe": "embedded", "epochs": 3, "lr": .1}
    return SimpleNamespace(**{**own, **more})


def begin(args):
    """A run with these args that has saved something."""
    write(f"{args.output_dir}/args.json", check_folder(args))
    save_checkpoint(f"{args.output_dir}/checkpoints", {"epoch": 1})


def test_a_folder_is_new_or_this_very_runs(tmp_path):
    begin(settings(tmp_path / "run"))
    check_folder(settings(tmp_path / "run", epochs=9))
    with pytest.raises(UserError, match="holds another run .--lr was 0.1, is 0.2."):
        check_folder(settings(tmp_path / "run", lr=.2))


def test_a_run_that_saved_nothing_may_start_again_with_another_option(tmp_path):
    write(f"{tmp_path}/args.json", check_folder(settings(tmp_path)))
    assert json.loads(check_folder(settings(tmp_path, lr=.2)))["lr"] == .2


def test_a_run_is_found_again_from_another_directory(tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("a dog")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    begin(settings("run", prompts=["p.txt", "a cat"], benign=None))
    monkeypatch.chdir(tmp_path / "elsewhere")
    check_folder(settings("../run", prompts=["../p.txt", "a cat"], benign=None))
    with pytest.raises(UserError, match="holds another run .--prompts was"):
        check_folder(settings("../run", prompts=["../p.txt", "a cow"], benign=None))


def test_a_prompt_file_that_was_edited_is_noticed(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a dog")
    begin(settings(tmp_path / "run", prompts=[str(path)]))
    path.write_text("a cat")
    with pytest.raises(UserError, match="--prompts was .*, with another content"):
        check_folder(settings(tmp_path / "run", prompts=[str(path)]))


def test_a_model_is_one_by_its_files_and_not_by_its_path(pipeline, foreign_pipeline, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(pipeline, copy)
    assert is_same_base(str(copy), pipeline) and is_same_base(f"{copy}/../copy", str(copy))
    assert not is_same_base(str(copy), "tiny") and not is_same_base("some/hub", "other/hub")
    begin(settings(tmp_path / "run", model=pipeline))
    check_folder(settings(tmp_path / "run", model=str(copy)))
    (copy / "unet" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="--model was"):
        check_folder(settings(tmp_path / "run", model=str(copy)))


def test_a_base_that_was_moved_is_the_same(pipeline, tmp_path):
    shutil.copytree(pipeline, tmp_path / "one")
    begin(settings(tmp_path / "run", model=str(tmp_path / "one")))
    (tmp_path / "one").rename(tmp_path / "two")
    check_folder(settings(tmp_path / "run", model=str(tmp_path / "two")))


def test_an_attacks_text_states_belong_to_its_prompt_file(tmp_path):
    (tmp_path / "p.csv").write_text("prompt,states\na dog,0\n")
    (tmp_path / "p.safetensors").write_bytes(b"1")
    begin(settings(tmp_path / "run", prompts=[str(tmp_path / "p.csv")]))
    (tmp_path / "p.safetensors").write_bytes(b"2")
    with pytest.raises(UserError, match="--prompts was .*, with another content"):
        check_folder(settings(tmp_path / "run", prompts=[str(tmp_path / "p.csv")]))


def test_fewer_epochs_than_are_done_are_refused(tmp_path):
    begin(settings(tmp_path))
    save_checkpoint(f"{tmp_path}/checkpoints", {"epoch": 3})
    with pytest.raises(UserError, match="--epochs: 2 is given, and 3 are done"):
        check_folder(settings(tmp_path, epochs=2))


@pytest.mark.parametrize("name", ["README.md", "model_index.json", "unet/config.json",
                                  "pytorch_lora_weights.safetensors"])
def test_what_another_program_made_is_never_written_over(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("theirs")
    with pytest.raises(UserError, match="and no args.json says"):
        check_folder(settings(tmp_path))
    assert (tmp_path / name).read_text() == "theirs"


def test_checkpoints_of_nobody_knows_what_are_not_resumed(tmp_path):
    save_checkpoint(f"{tmp_path}/checkpoints", {"epoch": 1})
    with pytest.raises(UserError, match="holds checkpoints, and no args.json says"):
        check_folder(settings(tmp_path))


def test_what_changes_nothing_but_rounding_may_change(tmp_path):
    begin(settings(tmp_path, groups=8, batch_size=8, device="auto", save_every=5))
    check_folder(settings(tmp_path, groups=8, batch_size=2, device="cpu", save_every=1))
    with pytest.raises(UserError, match="--groups was 8, is 4"):
        check_folder(settings(tmp_path, groups=4, batch_size=8, device="auto", save_every=5))


def test_a_base_with_another_readme_is_the_same(pipeline, tmp_path):
    shutil.copytree(pipeline, tmp_path / "base")
    for name in ("README.md", "diffusion_pytorch_model.fp16.safetensors"):
        (tmp_path / "base" / "unet" / name).write_text("hi")
    assert is_same_base(str(tmp_path / "base"), pipeline)


def test_what_is_in_the_way_is_found_before_the_work(tmp_path):
    (tmp_path / "curve.png").mkdir()
    with pytest.raises(UserError, match="curve.png is a folder, where a file will be written"):
        check_folder(settings(tmp_path))
    (tmp_path / "curve.png").rmdir()
    (tmp_path / "samples").write_text("")
    with pytest.raises(UserError, match="samples is a file, where a folder will be made"):
        check_folder(settings(tmp_path))


def test_a_folder_of_the_first_edition_is_refused_in_a_sentence(tmp_path):
    save_checkpoint(f"{tmp_path}/checkpoints", {"epoch": 1})
    (tmp_path / "args.json").write_text('{"model": "tiny", "lr": 0.1, "guide": "plain"}')
    with pytest.raises(UserError, match="made by an earlier edition of this program"):
        check_folder(settings(tmp_path))


def test_a_torn_checkpoint_is_never_loaded(tmp_path, capsys):
    folder = str(tmp_path)
    for epoch in (1, 2, 3):
        save_checkpoint(folder, {"epoch": epoch, "weights": {"w": torch.ones(50)}}, limit=2)
    assert sorted(os.listdir(folder)) == ["epoch_0002.pt", "epoch_0003.pt", "latest.json"]
    newest, older = read_pointer(folder)
    with open(f"{folder}/{newest['file']}", "r+b") as file:
        file.truncate(100)
    assert load_checkpoint(folder)["epoch"] == 2
    os.remove(f"{folder}/{older['file']}")
    assert load_checkpoint(folder) is None
    assert "no checkpoint in" in capsys.readouterr().err
    (tmp_path / "latest.json").write_text("[{")
    assert load_checkpoint(folder) is None


def test_without_a_limit_all_checkpoints_stay(tmp_path):
    for epoch in range(1, 6):
        save_checkpoint(str(tmp_path), {"epoch": epoch}, limit=None)
    assert saved_epochs(str(tmp_path)) == [5, 4, 3, 2, 1]
    assert len(list(tmp_path.glob("epoch_*.pt"))) == 5
