"""Muon: momentum whose matrices are made orthogonal by Newton-Schulz; learns in fewer steps than AdamW.

Every step is dear here (about a second on one core), the orthogonalisation costs a sixth of it.
"""

import torch


def orthogonal(matrix):
    """The nearest matrix with all singular values near one, bfloat16 (rows, columns)."""
    x = matrix.bfloat16()
    upright = x.shape[0] > x.shape[1]
    x = x.T if upright else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.T if upright else x


class Muon(torch.optim.Optimizer):
    """For weights of two or more dimensions; a convolution counts as (out, in * height * width)."""

    def __init__(self, weights, lr, momentum=0.95, weight_decay=0.01):
        super().__init__(weights, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                ahead = weight.grad.lerp(state["momentum"], group["momentum"])  # Nesterov
                update = orthogonal(ahead.flatten(1))
                # The root mean square of an AdamW step is about 0.2, so both share one learning rate.
                size = 0.2 * max(update.shape) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update.view_as(weight).to(weight.dtype), alpha=-group["lr"] * size)


def optimizers(modules, lr):
    """[Muon for the matrices and kernels of the blocks, AdamW for embeddings, vectors and what enters or leaves]."""
    matrices, others = [], []
    outer = ("embed", "shared", "relative", "conv_in", "conv_out", "proj_out.w", "norm_out")
    for module in modules:
        for name, weight in module.named_parameters():
            inside = weight.ndim > 1 and not any(part in name for part in outer)
            if name.startswith(("single_transformer_blocks", "transformer_blocks")):
                inside = weight.ndim > 1
            (matrices if inside else others).append(weight)
    return [
        Muon(matrices, lr),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True),
    ]
