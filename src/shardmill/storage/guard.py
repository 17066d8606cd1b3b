"""Foreign folders on disk: what lies in them that is no plain file, and opening files that may be swapped meanwhile.

A link is followed inside the folder, and, in the layout of the Hub's cache, to the blobs of the same repository. What
was opened is looked at once more, by the name that the kernel has for it: a link that appears between two looks leads
nowhere. Nothing but a regular file is ever opened: a pipe would block, a device would answer without end.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from shardmill.errors import refuse

LINK_OUT = "a link that leads out of the checkpoint"
SPECIAL = "no regular file"


@dataclass(slots=True)
class Oddities:
    """What in a folder is neither a plain file nor a plain folder; names are relative to it."""

    folders_out: list[str] = field(default_factory=list)
    """Links to folders outside."""
    folders_in: list[str] = field(default_factory=list)
    """Links to folders inside; they are not entered, so that loops end."""
    hidden: list[str] = field(default_factory=list)
    """Hidden folders, which are not entered."""
    files: dict[str, str] = field(default_factory=dict)
    """What is odd about it, by name."""


def allowed_roots(folder: Path) -> tuple[Path, ...]:
    """Where the files of a folder may really lie: below it, or, of a snapshot in the Hub's cache, among the blobs."""
    root = folder.resolve()
    repository = root.parent.parent
    blobs = [repository / "blobs"] if root.parent.name == "snapshots" else []
    if blobs and repository.name.startswith("models--"):
        blobs.append(repository.parent / "blobs")
    return (root, *blobs)


def is_inside(real: Path, roots: tuple[Path, ...]) -> bool:
    """Whether a real path lies below one of the roots."""
    return any(map(real.is_relative_to, roots))


def real_file(folder: Path, name: str) -> Path:
    """The real path of a file of a foreign folder.

    Raises:
        CheckpointInvalid: absent, no regular file, or it leads out of the folder.
    """
    try:
        real = (folder / name).resolve(strict=True)
        status = real.stat()
    except (OSError, RuntimeError, ValueError) as error:
        raise refuse("file-missing", "file is missing", file=name, way_out="fetch it again") from error
    if not stat.S_ISREG(status.st_mode):
        raise refuse("file-irregular", "expected a regular file", file=name)
    if not is_inside(real, allowed_roots(folder)):
        raise refuse("file-outside", f"it is {LINK_OUT}", file=name, way_out="copy the file in")
    return real


def open_inside(folder: Path, name: str) -> int:
    """Open a file of a foreign folder for reading; returns its descriptor.

    Raises:
        CheckpointInvalid: absent, no regular file, or it leads out of the folder.
        OSError: the file system refuses.
    """
    real = real_file(folder, name)
    try:
        found = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # it became a link, or a socket
            raise refuse("file-irregular", "expected a regular file", file=name) from error
        raise
    try:
        _check_open(found, real, folder, name)
    except BaseException:
        os.close(found)
        raise
    return found


def _check_open(descriptor: int, real: Path, folder: Path, name: str) -> None:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise refuse("file-irregular", "expected a regular file", file=name)
    if not is_inside(_path_of(descriptor, real), allowed_roots(folder)):
        raise refuse("file-outside", f"it is {LINK_OUT}", file=name, way_out="copy the file in")


def _path_of(descriptor: int, otherwise: Path) -> Path:
    """Where an open file lies, as the kernel knows; one that was renamed or deleted meanwhile lies where it was."""
    try:
        return Path(str(Path(f"/proc/self/fd/{descriptor}").readlink()).removesuffix(" (deleted)"))
    except OSError:  # no /proc here
        return otherwise


def survey(folder: Path) -> Oddities:
    """Find what is odd in a folder, opening nothing and entering no link."""
    found = Oddities()
    roots = allowed_roots(folder)
    for here, folders, files in os.walk(folder):
        for name in folders:
            path = Path(here) / name
            relative = path.relative_to(folder).as_posix()
            if path.is_symlink():
                inside = is_inside(path.resolve(), roots)
                (found.folders_in if inside else found.folders_out).append(relative)
            elif name.startswith("."):
                found.hidden.append(relative)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(here) / name
            if reason := _oddity(path, roots):
                found.files[path.relative_to(folder).as_posix()] = reason
    for names in (found.folders_in, found.folders_out, found.hidden):
        names.sort()
    return found


def _oddity(path: Path, roots: tuple[Path, ...]) -> str:
    try:
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            return ""
        if not stat.S_ISLNK(mode):
            return SPECIAL
        real = path.resolve(strict=True)
        if not is_inside(real, roots):
            return LINK_OUT
        return "" if real.is_file() else SPECIAL
    except (OSError, RuntimeError):
        return "a link that leads nowhere"
