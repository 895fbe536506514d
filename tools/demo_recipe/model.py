"""BitNet b1.58 with straight-through estimators, and its float twin.

The ternary forward is the packed model's arithmetic: int8 activations per token by absmax, ternary
weights by absmean, exact integer products, embeddings, norms and scales rounded to bfloat16 as
they are stored.  The backward treats every rounding as the identity.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    vocab: int = 4096
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    ffn: int = 768  # a multiple of 256, so that GGUF's blocks can hold it
    context: int = 1024
    theta: float = 10000.0
    eps: float = 1e-5

    @property
    def qkv(self) -> tuple[int, int, int]:
        return self.heads * self.head_dim, *[self.kv_heads * self.head_dim] * 2

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


Parameters = dict[str, Tensor]
MATRICES = ("qkv", "o", "gate_up", "down")
NORMS = ("attn_norm", "attn_sub_norm", "ffn_norm", "ffn_sub_norm")


def initial_parameters(shape: Shape, seed: int) -> Parameters:
    """Latent float32 parameters; matrices and norms of all layers are stacked along dim 0."""
    g = torch.Generator().manual_seed(seed)
    n, e, f = shape.layers, shape.hidden, shape.ffn

    def normal(*size: int, std: float) -> Tensor:
        return torch.randn(*size, generator=g) * std

    parameters = {
        "embed": normal(shape.vocab, e, std=0.02),
        "qkv": normal(n, sum(shape.qkv), e, std=e**-0.5),
        "o": normal(n, e, shape.qkv[0], std=(2 * n * e) ** -0.5),
        "gate_up": normal(n, 2 * f, e, std=e**-0.5),
        "down": normal(n, e, f, std=(2 * n * f) ** -0.5),
        "attn_norm": torch.ones(n, e),
        "attn_sub_norm": torch.ones(n, shape.qkv[0]),
        "ffn_norm": torch.ones(n, e),
        "ffn_sub_norm": torch.ones(n, f),
        "norm": torch.ones(e),
    }
    return {name: p.requires_grad_() for name, p in parameters.items()}


def blocks(shape: Shape, name: str) -> tuple[int, ...]:
    """Rows of the projections that a stacked matrix holds, each with a weight scale of its own."""
    return {"qkv": shape.qkv, "gate_up": (shape.ffn, shape.ffn)}.get(name, (shape.hidden,))


def stored(x: Tensor) -> Tensor:
    """Rounded to bfloat16, as the checkpoint stores it."""
    return x.bfloat16().float()


def quantise_weight(w: Tensor) -> tuple[Tensor, Tensor]:
    """Ternary codes (float) of one projection and its stored scale: absmean."""
    mean = w.abs().mean().clamp(min=1e-5)
    return (w * (1.0 / mean)).round_().clamp_(-1, 1), stored(mean)


@dataclass
class Weight:
    """A projection ready for many forwards: ``dense`` is what multiplies x, up to rounding."""

    latent: Tensor  # [N, K], gathers the gradient
    dense: Tensor  # [N, K]
    codes: Tensor | None = None  # int8 [K, N], None in the float twin
    scale: Tensor | None = None  # [N]


class _Linear(torch.autograd.Function):
    """y = (q . codes) / s * scale; gradients as if nothing had been rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, latent: Tensor, weight: Weight) -> Tensor:
        s = 127.0 / x.abs().amax(-1, keepdim=True).clamp_(min=1e-5)
        q = (x * s).round_().clamp_(-128, 127)
        y = torch._int_mm(q.to(torch.int8), weight.codes).float()
        ctx.save_for_backward(q.div_(s), weight.dense)
        return y.div_(s).mul_(weight.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, dense = ctx.saved_tensors
        return grad @ dense, grad.t() @ x, None


class _TiedLoss(torch.autograd.Function):
    """Summed cross entropy of h @ embed.T; the gradients are made in the forward, in place."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, embed: Tensor, targets: Tensor) -> Tensor:
        logits = h @ embed.t()
        rows = torch.arange(len(targets))
        lse = torch.logsumexp(logits, -1)
        loss = (lse - logits[rows, targets]).sum()
        p = logits.sub_(lse[:, None]).exp_()
        p[rows, targets] -= 1
        ctx.save_for_backward(p @ embed, p.t() @ h)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gh, ge = ctx.saved_tensors
        return gh * grad, ge * grad, None


class Model:
    """Functions over latent parameters; ``prepare`` once per step, then any number of batches."""

    def __init__(self, shape: Shape, parameters: Parameters, ternary: bool) -> None:
        self.shape, self.parameters, self.ternary = shape, parameters, ternary
        frequencies = shape.theta ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angles = torch.arange(shape.context)[:, None].float() * frequencies
        self.cos, self.sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        self.weights: dict[str, list[Weight]] = {}

    @torch.no_grad()
    def prepare(self) -> None:
        """Quantise all weights and round what is stored in bfloat16."""
        for name in MATRICES:
            self.weights[name] = [self._weight(name, w) for w in self.parameters[name]]
        self.embed = self.parameters["embed"].detach()
        self.norms = {k: self.parameters[k].detach() for k in (*NORMS, "norm")}
        if self.ternary:
            self.embed = stored(self.embed)
            self.norms = {k: stored(v) for k, v in self.norms.items()}
        self.embed.requires_grad_()
        for value in self.norms.values():
            value.requires_grad_()

    def _weight(self, name: str, w: Tensor) -> Weight:
        latent = w.detach().requires_grad_()
        if not self.ternary:
            return Weight(latent, latent)
        parts = [quantise_weight(p) for p in w.split(blocks(self.shape, name))]
        codes = torch.cat([c for c, _ in parts])
        scale = torch.cat([s.expand(len(c)) for c, s in parts])
        return Weight(latent, codes * scale[:, None], codes.to(torch.int8).t(), scale)

    def _linear(self, x: Tensor, name: str, layer: int) -> Tensor:
        weight = self.weights[name][layer]
        return (
            _Linear.apply(x, weight.latent, weight) if self.ternary else F.linear(x, weight.latent)
        )

    def _norm(self, x: Tensor, name: str, layer: int) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.norms[name][layer], self.shape.eps)

    def _attention(self, x: Tensor, layer: int, batch: int) -> Tensor:
        shape, length = self.shape, len(x) // batch
        qkv = self._linear(x, "qkv", layer).view(batch, length, -1, shape.head_dim).transpose(1, 2)
        turned = qkv[:, : shape.heads + shape.kv_heads]
        low, high = turned.chunk(2, -1)
        turned = turned * self.cos[:length] + torch.cat((-high, low), -1) * self.sin[:length]
        q, k = turned[:, : shape.heads], turned[:, shape.heads :]
        v = qkv[:, shape.heads + shape.kv_heads :]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).reshape(len(x), -1)

    def _ffn(self, x: Tensor, layer: int) -> Tensor:
        gate, up = self._linear(x, "gate_up", layer).chunk(2, -1)
        return torch.relu(gate).square() * up

    def hidden(self, ids: Tensor) -> Tensor:
        """int64 [B, T] -> float32 [B*T, E], after the last norm."""
        x = F.embedding(ids.reshape(-1), self.embed)
        for i in range(self.shape.layers):
            a = self._attention(self._norm(x, "attn_norm", i), i, len(ids))
            x = x + self._linear(self._norm(a, "attn_sub_norm", i), "o", i)
            f = self._ffn(self._norm(x, "ffn_norm", i), i)
            x = x + self._linear(self._norm(f, "ffn_sub_norm", i), "down", i)
        return F.rms_norm(x, x.shape[-1:], self.norms["norm"], self.shape.eps)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Summed natural-log loss of [B, T] targets."""
        return _TiedLoss.apply(self.hidden(ids), self.embed, targets.reshape(-1))

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """int64 [B, T] -> float32 [B, T, V]."""
        return (self.hidden(ids) @ self.embed.t()).view(*ids.shape, -1)

    def collect_gradients(self) -> None:
        """Hand the gradients of this step's (rounded) copies to the latent parameters."""
        for name, rounded in {"embed": self.embed, **self.norms}.items():
            self.parameters[name].grad = rounded.grad
            rounded.grad = None
        for name in MATRICES:
            self.parameters[name].grad = torch.stack([w.latent.grad for w in self.weights[name]])
