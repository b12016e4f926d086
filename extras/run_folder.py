"""
The folder of a run: who has it, which settings it began with, how its files are replaced.

    settings.json        the flags, for people and for --resume
    model.safetensors    with config.json and tokenizer.json: the model, for its users
    resume.pt            the last checkpoint. Without it the run has not begun, and can begin anew
    metrics.jsonl        the log
    new/                 files before they are renamed, and the lock of the run that is at work
"""

import errno
import json
import os
import shutil
import zlib
from contextlib import contextmanager
from pathlib import Path

CLAIMED = []  # files stay open, and locked, as long as the process lives


def claim(out, resume):
    """Take the folder for this process until it ends. Raises ValueError where that can't be."""
    check_content(out, resume)
    (out / "new").mkdir(parents=True, exist_ok=True)
    file = open(out / "new" / "lock", "a+")  # noqa: SIM115, it stays open
    try:
        lock(file)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # else a disk that knows no locks
            cure = "wait for its end, end it, or choose another --out"
            raise ValueError(f"{out} belongs to a run that is at work: {cure}") from error
    CLAIMED.append(file)
    check_content(out, resume)  # another run may have come and gone in between


def lock(file):
    """For this process alone: it ends with it, and no process that it starts inherits it."""
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def check_content(out, resume):
    found = set(os.listdir(out)) if out.exists() else set()
    found -= {"new"}
    if resume and "resume.pt" not in found:
        raise ValueError(
            f"{out} has no checkpoint to resume: start its run again, without --resume"
        )
    began = "resume.pt" in found or "metrics.jsonl" in found or "settings.json" not in found
    if not resume and found and began:
        raise ValueError(f"{out} is not empty: --resume its run, or choose another --out")


def settings_of(args):
    """-> what --resume goes by, and people read. The data is known by its checksum."""
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "resume")}
    content = Path(args.data).read_bytes() if args.data else b""
    return settings | {"data_checksum": zlib.crc32(content)}


def save_settings(out, settings):
    text = json.dumps(settings, indent=2)
    with new_files(out) as folder:
        (folder / "settings.json").write_text(text)


def load_settings(out):
    """-> {flag: value}. Raises ValueError where there are none."""
    try:
        return json.loads((out / "settings.json").read_text())
    except (OSError, ValueError) as error:
        cure = f"if there is a model, --init {out} and a new --out start from it"
        raise ValueError(f"{out} has no run to resume, {error}; {cure}") from error


@contextmanager
def new_files(out):
    """-> a folder to write into. Afterwards each file replaces its old one, resume.pt last: after a
    kill each is whole, the old or the new. Raises OSError, for example on a full disk."""
    folder = out / "new"
    try:
        for file in written_in(folder):  # what a kill has left
            file.unlink()
        yield folder
        for file in written_in(folder):
            with open(file, "rb+") as opened:
                os.fsync(opened)  # or a power cut could leave an empty file under the new name
            os.replace(file, out / file.name)
    except Exception as error:  # each library has its own
        free = f"{shutil.disk_usage(out).free / 2**20:.1f} MB are left there"
        why = f"could not write to {out}, {free}: {str(error).splitlines()[0]}"
        raise OSError(f"{why}; its last checkpoint stands") from error


def written_in(folder):
    files = [file for file in folder.iterdir() if file.name != "lock"]
    return sorted(files, key=lambda file: (file.name == "resume.pt", file.name))
