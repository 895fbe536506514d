"""Muon for matrices (momentum, orthogonalised by Newton-Schulz), Adam for everything else."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from demo_recipe.model import MATRICES, Parameters, Shape, blocks

MATRIX_RATE, MOMENTUM, DECAY = 0.02, 0.95, 0.1
ADAM_RATE, BETAS, EPS = 0.004, (0.9, 0.95), 1e-10


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """About U V^T of each [n, m] matrix of a batch [..., n, m]."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = g.shape[-2] > g.shape[-1]
    x = g.mT if wide else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if wide else x


class Optimiser:
    """One step over the stacked parameters; ``state`` is saved with them."""

    def __init__(self, shape: Shape, parameters: Parameters) -> None:
        self.shape, self.parameters = shape, parameters
        self.state: dict[str, Any] = {"step": 0}
        for name, p in parameters.items():
            moments = 1 if name in MATRICES else 2
            self.state[name] = [torch.zeros_like(p, requires_grad=False) for _ in range(moments)]

    @torch.no_grad()
    def step(self, rate: float, decay: float) -> None:
        """``rate`` multiplies both learning rates, ``decay`` the weight decay."""
        self.state["step"] += 1
        for name, p in self.parameters.items():
            if name in MATRICES:
                self._muon(name, p, rate, decay)
            else:
                self._adam(name, p, rate)
            p.grad = None

    def _muon(self, name: str, p: Tensor, rate: float, decay: float) -> None:
        (momentum,) = self.state[name]
        momentum.lerp_(p.grad, 1 - MOMENTUM)
        update = p.grad.lerp(momentum, MOMENTUM)
        p.mul_(1 - MATRIX_RATE * rate * DECAY * decay)
        start = 0
        for rows in blocks(self.shape, name):
            part = slice(start, start + rows)
            scale = math.sqrt(max(1.0, rows / p.shape[-1]))
            p[:, part] -= MATRIX_RATE * rate * scale * orthogonalise(update[:, part])
            start += rows

    def _adam(self, name: str, p: Tensor, rate: float) -> None:
        first, second = self.state[name]
        first.lerp_(p.grad, 1 - BETAS[0])
        second.lerp_(p.grad.square(), 1 - BETAS[1])
        t = self.state["step"]
        mean = first / (1 - BETAS[0] ** t)
        p -= ADAM_RATE * rate * mean / ((second / (1 - BETAS[1] ** t)).sqrt() + EPS)
