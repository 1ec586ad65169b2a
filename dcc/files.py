"""The one way in which dcc writes files and reads them: whole or not at all, never a part, and never for long."""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any

from dcc.errors import DccError

MOST = 2**25  # bytes of a text file; a plan of 1,000 steps and 300 sites has half as many
DEEPEST = 32  # levels of lists and objects in each other; dcc's own files have up to 9


def write_file(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Writes text (UTF-8) or bytes so that readers and other writers find the old file or the whole new one.

    Raises OSError, the old file untouched and no other left behind, where it cannot.
    """
    target = Path(path)
    part = target.with_name(f".dcc-{secrets.token_hex(8)}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(descriptor)
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def check_regular(path: str | os.PathLike[str], refused: type[DccError], most: int) -> None:
    """Raises `refused`, naming the path, unless it is a file of at most `most` bytes that this user may read.

    What is no file (a pipe, a device, a folder) is not opened, because that may wait for ever.
    """
    try:
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not os.access(path, os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (OSError, ValueError) as error:  # the latter: a path with a zero byte
        raise refused(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(found.st_mode):
        raise refused(f"{path}: cannot be read: it is a pipe or a device, no file")
    if found.st_size > most:
        raise refused(f"{path}: cannot be read: it has {found.st_size} bytes, more than the {most} of the largest one")


def read_bytes(path: str | os.PathLike[str], refused: type[DccError], most: int = MOST) -> bytes:
    """The file's bytes. Raises `refused`, naming the path, for what is no readable file of at most `most` bytes."""
    check_regular(path, refused, most)
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise refused(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(data) > most:
        raise refused(f"{path}: cannot be read: it has more than the {most} bytes of the largest one")
    return data


def read_text(path: str | os.PathLike[str], refused: type[DccError]) -> str:
    """The file's text (UTF-8). Raises `refused`, naming the path, where there is none."""
    try:
        return read_bytes(path, refused).decode()
    except UnicodeDecodeError as error:
        raise refused(f"{path}: cannot be read: it is no UTF-8 text: {error}") from error


def parse_json(text: str | bytes, where: str, refused: type[DccError]) -> Any:
    """The value that a JSON text holds: of bounded depth, no name twice in an object, all text writable.

    Raises `refused`, naming `where`, for anything else.
    """
    try:
        data = json.loads(text, object_pairs_hook=_object)
        level = [data]
        for _ in range(DEEPEST):
            "".join([item for item in level if isinstance(item, str)]).encode()  # no halves of a pair of surrogates
            level = [part for item in level if isinstance(item, (list, dict)) for part in _parts(item)]
            if not level:
                return data
    except ValueError as error:
        raise refused(f"{where} is not JSON as dcc writes it: {error}") from error
    except RecursionError as error:
        raise refused(f"{where} is nested too deeply") from error
    raise refused(f"{where} is nested too deeply: more than {DEEPEST} levels")


def _parts(item: list[Any] | dict[str, Any]) -> list[Any]:
    return item if isinstance(item, list) else [*item, *item.values()]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found
