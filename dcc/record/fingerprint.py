"""Identity of a denoiser: of its structure, of its weights, and of its code."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch
from torch import nn

SAMPLED = 16  # values of each tensor that identify the weights


def fingerprint(module: nn.Module) -> str:
    """First 16 hexadecimal digits of SHA-256 over names and shapes of all parameters and buffers.

    The same for two checkpoints of one architecture, and for every dtype and device.
    """
    tensors = [*module.named_parameters(), *module.named_buffers()]
    lines = "\n".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def weights_hash(module: nn.Module) -> str:
    """First 16 hexadecimal digits of SHA-256 over names, shapes and some values of the `state_dict`.

    Values are SAMPLED evenly spaced elements of each tensor, so that large models take milliseconds; other weights of
    the same architecture, and other dtypes, give another hash. Tensors on the meta device count by shape alone.
    """
    lines, values = [], []
    for name, tensor in module.state_dict().items():
        lines.append(f"{name} {tuple(tensor.shape)}")
        if tensor.numel() and not tensor.is_meta:
            picks = torch.linspace(0, tensor.numel() - 1, SAMPLED, dtype=torch.float64).long()
            chosen = tensor.detach().reshape(-1)[picks.to(tensor.device)]
            values.append(torch.view_as_real(chosen).flatten() if chosen.is_complex() else chosen)
    digest = hashlib.sha256("\n".join(lines).encode())
    if values:
        digest.update(torch.cat([value.double().cpu() for value in values]).numpy().tobytes())
    return digest.hexdigest()[:16]


def code_hash(module: nn.Module) -> str:
    """First 16 hexadecimal digits of SHA-256 over the module tree as it prints, all dtypes, and the classes' sources.

    The same where `forward` runs the same code with the same settings, as far as those print; other weights make no
    difference. Classes without a source file (of an interactive session) count by name.
    """
    dtypes = " ".join(str(tensor.dtype) for tensor in (*module.parameters(), *module.buffers()))
    digest = hashlib.sha256(f"{module!r} {fingerprint(module)} {dtypes}".encode())
    for name in sorted({type(part).__module__ for part in module.modules()}):
        source = getattr(sys.modules.get(name), "__file__", None)
        digest.update(name.encode() + (Path(source).read_bytes() if source else b""))
    return digest.hexdigest()[:16]
