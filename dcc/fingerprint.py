"""Identity of a denoiser: of its structure, and of its weights."""

from __future__ import annotations

import hashlib

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
