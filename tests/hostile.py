"""Files to be afraid of: valid ones with one value changed, damaged ones, and what is no file at all."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from dcc.errors import DccError
from dcc.tensor_file import checksum

LIMIT = 1.0  # seconds of the processor for one file
PATIENCE = 60  # seconds on the clock, in which a load that waits for something never ends
DEEP = "[" * 100_000


def code(canary: Path) -> str:
    """An expression that makes the canary file where anything evaluates it."""
    return f"__import__('pathlib').Path({str(canary)!r}).touch()"


def values(canary: Path) -> dict[str, Any]:
    """What may stand in the place of any value of a file."""
    nested: Any = 1
    for _ in range(40):
        nested = [nested]
    return {
        "null": None, "true": True, "minus one": -1, "a fraction": 0.5, "a large number": 99, "beyond 64 bits": 2**70,
        "beyond a float": 10**400, "NaN": float("nan"), "infinity": float("inf"), "empty text": "", "text": "x",
        "code": code(canary), "an empty list": [], "a list": [1], "an empty object": {}, "an object": {"a": 1},
        "deeply nested": nested, "half a pair": "\ud800",
    }  # fmt: skip


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of the values in each other; of a list only the first, the last and those of another kind."""
    yield path
    if isinstance(data, dict):
        for name, value in data.items():
            yield from places(value, (*path, name))
    elif isinstance(data, list):
        kinds = [str(value[:3] if isinstance(value, list) else type(value)) for value in data]
        for index, kind in enumerate(kinds):
            if index in (0, len(data) - 1) or kind not in kinds[:index]:
                yield from places(data[index], (*path, index))


def changed(data: Any, canary: Path, most: int) -> Iterator[tuple[str, Any]]:
    """The data with one value changed, left out, doubled or renamed; at most so many, evenly chosen."""
    found = []
    for path in places(data):
        where = "/".join(map(str, path)) or "all"
        found += [(f"{where}: {name}", path, "set", value) for name, value in values(canary).items()]
        if path:
            found += [(f"{where}: {edit}", path, edit, None) for edit in ("left out", "twice", "renamed")]
    random.Random(0).shuffle(found)
    for name, path, edit, value in found[:most]:
        yield name, _edited(copy.deepcopy(data), path, edit, value)


def _edited(data: Any, path: tuple[Any, ...], edit: str, value: Any) -> Any:
    if not path:
        return value
    holder = data
    for key in path[:-1]:
        holder = holder[key]
    key = path[-1]
    if edit == "set":
        holder[key] = value
    elif edit == "left out":
        del holder[key]
    elif isinstance(holder, list):
        holder.insert(key, holder[key])
    elif edit == "renamed":
        holder[f"{key}x"] = holder.pop(key)
    else:
        holder[f"{key}2"] = holder[key]
    return data


def damaged(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Bytes that are no longer what was written."""
    for size in sorted({0, 1, 7, 8, 9, 64, len(data) // 2, len(data) - 1}):
        yield f"cut after {size} bytes", data[:size]
    rng = random.Random(1)
    for index in range(25):
        place = rng.randrange(len(data))
        yield f"bit {index} turned over", data[:place] + bytes([data[place] ^ (1 << index % 8)]) + data[place + 1 :]
    yield "zeros", b"\0" * len(data)
    yield "noise", rng.randbytes(len(data))
    yield "more behind it", data + b"more"
    yield "twice", data * 2
    yield "nested without end", DEEP.encode()
    yield "objects without end", b'{"a":' * 100_000
    yield "a number of 5000 digits", b'{"dcc_plan": ' + b"9" * 5000 + b"}"
    yield "a header of 2**63 bytes", (2**63 - 1).to_bytes(8, "little") + data[8:]
    yield "a header nested without end", len(DEEP).to_bytes(8, "little") + DEEP.encode()
    yield "other text", "caf\u00e9".encode("latin-1")
    yield "text of two bytes a letter", "{}".encode("utf-16")
    yield "a mark before the text", b"\xef\xbb\xbf" + data


def no_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Paths at which there is no file, or one that never ends."""
    pipe, loop, sparse = folder / "pipe", folder / "loop", folder / "sparse"
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    with open(sparse, "wb") as file:
        file.truncate(2**40)
    to_pipe, to_folder = folder / "to_pipe", folder / "to_folder"
    to_pipe.symlink_to(pipe)
    to_folder.symlink_to(folder)
    devices = {f"{name}": Path("/dev") / name for name in ("zero", "null", "random", "tty", "stdin")}
    yield from {"a folder": folder, "a pipe": pipe, "a link to a pipe": to_pipe, "a link to itself": loop}.items()
    yield from {"a link to a folder": to_folder, "a terabyte of holes": sparse, "nothing": folder / "none"}.items()
    yield from {"a path that is too long": folder / ("x" * 5000), "a zero byte": folder / "a\0b"}.items()
    yield from {"below a file": sparse / "below"}.items()
    yield from devices.items()


def rewrite(path: Path, mark: str, version: int, header: Any, **metadata: str | None) -> None:
    """The file of tensors with another header, and a checksum that fits it unless one is given."""
    with safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    text = json.dumps(header)
    own = {mark: str(version), "header": text, "checksum": checksum(mark, version, text, tensors)} | metadata
    save_file(tensors, str(path), {name: value for name, value in own.items() if value is not None})


def header_of(path: Path) -> Any:
    """The JSON header of a file of tensors."""
    with safe_open(str(path), framework="pt") as file:
        return json.loads(file.metadata()["header"])


@contextmanager
def quickly(name: str) -> Iterator[None]:
    """Fails for what takes more than LIMIT, or waits."""

    def late(*_: Any) -> None:
        raise AssertionError(f"{name}: waits for something")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(PATIENCE)
    begun = time.process_time()
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert time.process_time() - begun < LIMIT, f"{name}: takes {time.process_time() - begun:.1f} s"


def outcome(name: str, load: Callable[[], Any], refused: type[DccError]) -> Any:
    """What was loaded, or None where it was refused by an error of dcc's that says something."""
    with quickly(name):
        try:
            return load()
        except refused as error:
            assert len(str(error)) > 10, name
            return None
        except Exception as error:
            raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
