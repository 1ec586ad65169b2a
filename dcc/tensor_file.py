"""A safetensors file with a JSON header and a checksum of both: the form of profiles, checkpoints and graphs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dcc.errors import DccError
from dcc.files import parse_json, read_bytes, write_file

MOST = 2**30  # bytes of a file; a profile of 250 steps and 200 sites has a tenth
MOST_HEADER = 2**22  # bytes of its JSON header; a graph of 10,000 operators has half
PREFIX = 8  # bytes that hold the length of what safetensors keeps before the tensors


def write_tensors(
    path: str | os.PathLike[str], mark: str, version: int, header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Writes a file of one kind, its `mark`, as `write_file` does.

    Raises OSError where it cannot, ValueError for more than `read_tensors` takes.
    """
    text = json.dumps(header)
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {mark: str(version), "header": text, "checksum": checksum(mark, version, text, own)}
    data = save(own, metadata)
    if len(data) > MOST or len(text.encode()) > MOST_HEADER:
        raise ValueError(f"more than {MOST} bytes, or more than {MOST_HEADER} bytes of header, which none would read")
    write_file(path, data)


def read_tensors(
    path: str | os.PathLike[str], mark: str, version: int, refused: type[DccError]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file of `write_tensors`. Raises `refused`, naming the file and what is wrong with it."""
    data = read_bytes(path, refused, MOST)
    end = PREFIX + int.from_bytes(data[:PREFIX], "little")
    if len(data) <= PREFIX or end > len(data) or end > 2 * MOST_HEADER:
        raise refused(f"{path}: not a safetensors file, or cut short")
    outer = parse_json(data[PREFIX:end], f"{path}: not a safetensors file, or cut short: its header", refused)
    metadata = outer.get("__metadata__") if isinstance(outer, dict) else None
    if not isinstance(metadata, dict) or mark not in metadata:
        raise refused(f"{path}: the field {mark!r} is missing, so this is no file of that kind")
    if metadata[mark] != str(version):
        raise refused(
            f"{path}: field {mark!r} is {metadata[mark]!r}; this version of dcc reads {version}; make it anew"
        )
    try:
        tensors = load(data)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:  # unknown dtypes, odd sizes
        raise refused(f"{path}: not a safetensors file, or cut short: {error}") from error
    text = metadata.get("header")
    if not isinstance(text, str) or len(text.encode()) > MOST_HEADER:
        raise refused(f"{path}: field 'header' is missing, or has more than {MOST_HEADER} bytes")
    if metadata.get("checksum") != checksum(mark, version, text, tensors):
        raise refused(f"{path}: field 'checksum' does not fit the header and the tensors; the file was changed")
    header = parse_json(text, f"{path}: field 'header'", refused)
    if not isinstance(header, dict):
        raise refused(f"{path}: field 'header' is not a JSON object")
    return header, tensors


def checksum(mark: str, version: int, header: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of all that a file says."""
    facts = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in sorted(tensors)]
    digest = hashlib.sha256(json.dumps([mark, version, header, facts]).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
