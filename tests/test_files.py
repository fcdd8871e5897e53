"""plumbing/files.py: files that appear whole or not at all."""
import os

import pytest

from plumbing.files import make_folder, write
from plumbing.options import UserError


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    """/dev/full stands for a full disk: what is written there fails with ENOSPC."""
    path = tmp_path / "file"
    write(str(path), "first")
    os.symlink("/dev/full", f"{path}.tmp")
    with pytest.raises(UserError, match="No space left on device.*what was saved before stays"):
        write(str(path), "second")
    assert path.read_text() == "first"
    write(str(path), b"third")                          # the disk has room again
    assert path.read_bytes() == b"third"
    with pytest.raises(UserError, match="--output-dir: /proc/run can't be written"):
        make_folder("/proc/run")
