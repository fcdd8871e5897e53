"""Files that appear whole or not at all, and folders that can be written."""
import os

from plumbing.options import UserError


def write(path, data, option="--output-dir"):
    """Bytes or text into path, whole or not at all; a full disk ends the run with a sentence."""
    if isinstance(data, str):
        data = data.encode(errors="backslashreplace")   # a path need not be UTF-8
    unfinished = f"{path}.tmp"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(unfinished, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        if os.path.exists(unfinished):
            os.remove(unfinished)
        raise UserError(f"{option}: {path} could not be written ({error.strerror}); what was saved "
                        "before stays, and the same command can be given again") from None


def check_places(folder, files, folders=(), option="--output-dir"):
    """UserError where something is in the way of what will be written into a folder."""
    for name in files:
        if os.path.isdir(os.path.join(folder, name)):
            raise UserError(f"{option}: {os.path.join(folder, name)} is a folder, where a file "
                            "will be written; give another folder")
    for name in folders:
        if os.path.isfile(os.path.join(folder, name)):
            raise UserError(f"{option}: {os.path.join(folder, name)} is a file, where a folder "
                            "will be made; give another folder")


def make_folder(path, option="--output-dir"):
    """Make a folder and see that it can be written."""
    try:
        os.makedirs(path, exist_ok=True)
        probe = os.path.join(path, f".probe{os.getpid()}")
        open(probe, "wb").close()
        os.remove(probe)
    except (OSError, ValueError) as error:              # a name with a NUL is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{option}: {path} can't be written ({reason}); "
                        "give another folder") from None
