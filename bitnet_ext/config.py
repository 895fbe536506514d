"""The shape of a ternary transformer, one description for every family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bitnet_ext.errors import InvalidShapeError

__all__ = ["BitNetConfig", "RopeScaling"]


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are rescaled beyond the trained context.

    ``kind`` "linear" divides every frequency by ``factor``; "llama3" rescales low frequencies
    only and blends between the two wavelength bounds (the rule of Llama 3.1).
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class BitNetConfig:
    """The shape of a model; presets: ``bitnet_2b_4t``, ``gpt2_small``, ``gpt2_medium``, ``tiny``.

    BitNet b1.58 is arXiv:2402.17764, its 2B4T model arXiv:2504.12285.

    Sizes are in elements. ``scale_rule`` says how a stored weight scale enters the linear layer:
    "multiply": ``y = acc / s * scale``, "divide": ``y = acc / (scale * s)`` (see formats).
    ``linear_norm`` puts an RMSNorm in front of every linear layer's activation quantisation.
    ``ffn_norm`` False feeds the residual stream to the FFN without a norm.

    Raises:
        InvalidShapeError: a size is not positive, or heads do not divide as attention needs.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    hidden_act: Literal["relu2", "silu", "gelu", "gelu_tanh"] = "relu2"
    gated_ffn: bool = True
    ffn_norm: bool = True
    attn_sub_norm: bool = True
    ffn_sub_norm: bool = True
    attention_bias: bool = False
    ffn_bias: bool = False
    head_bias: bool = False
    fused_qkv: bool = False
    position: Literal["rope", "learned"] = "rope"
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    linear_norm: bool = False
    linear_norm_eps: float = 1e-6
    scale_rule: Literal["multiply", "divide"] = "multiply"
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    model_type: str = "bitnet"

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value <= 0:
                raise InvalidShapeError(
                    f"config.{name}: found {value!r}, wanted a positive integer"
                )
        if self.num_heads % self.num_kv_heads:
            raise InvalidShapeError(
                f"config.num_kv_heads: found {self.num_kv_heads}, "
                f"wanted a divisor of num_heads = {self.num_heads}"
            )
        if self.position == "rope" and self.head_dim % 2:
            raise InvalidShapeError(
                f"config.head_dim: found {self.head_dim}, wanted an even number for RoPE"
            )

    @property
    def q_size(self) -> int:
        """Width of the concatenated query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the concatenated key (or value) heads."""
        return self.num_kv_heads * self.head_dim

    @classmethod
    def bitnet_2b_4t(cls) -> BitNetConfig:
        """The shape of microsoft/bitnet-b1.58-2B-4T."""
        return cls(
            vocab_size=128256,
            hidden_size=2560,
            intermediate_size=6912,
            num_layers=30,
            num_heads=20,
            num_kv_heads=5,
            head_dim=128,
            max_position_embeddings=4096,
            bos_token_id=128000,
            eos_token_ids=(128001,),
        )

    @classmethod
    def gpt2_small(cls) -> BitNetConfig:
        """GPT-2 small's shape (124 M) with ternary linear layers."""
        return cls._gpt2(hidden=768, layers=12, heads=12)

    @classmethod
    def gpt2_medium(cls) -> BitNetConfig:
        """GPT-2 medium's shape (355 M) with ternary linear layers."""
        return cls._gpt2(hidden=1024, layers=24, heads=16)

    @classmethod
    def tiny(cls) -> BitNetConfig:
        """A BitNet b1.58 small enough for tests: every size odd-shaped on purpose."""
        return cls(
            vocab_size=331,
            hidden_size=96,
            intermediate_size=176,
            num_layers=3,
            num_heads=6,
            num_kv_heads=2,
            head_dim=16,
            max_position_embeddings=4096,
            bos_token_id=1,
            eos_token_ids=(2,),
        )

    @classmethod
    def _gpt2(cls, hidden: int, layers: int, heads: int) -> BitNetConfig:
        return cls(
            vocab_size=50257,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=hidden // heads,
            max_position_embeddings=1024,
            norm="layer",
            hidden_act="gelu_tanh",
            gated_ffn=False,
            attn_sub_norm=False,
            ffn_sub_norm=False,
            attention_bias=True,
            ffn_bias=True,
            fused_qkv=True,
            position="learned",
            eos_token_ids=(50256,),
            bos_token_id=50256,
            model_type="bitnet_ext",
        )
