"""Identity of a denoiser's structure."""

from __future__ import annotations

import hashlib

from torch import nn


def fingerprint(module: nn.Module) -> str:
    """First 16 hexadecimal digits of SHA-256 over names and shapes of all parameters and buffers.

    The same for two checkpoints of one architecture, and for every dtype and device.
    """
    tensors = [*module.named_parameters(), *module.named_buffers()]
    lines = "\n".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]
