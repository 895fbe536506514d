"""config.json, old keys and new, to a BitNetConfig and the way its linears are stored."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, cast

from bitnet_ext.checkpoint.fields import Fields
from bitnet_ext.config import BitNetConfig, RopeScaling
from bitnet_ext.errors import CheckpointError, InvalidShapeError, UnsupportedModelError

__all__ = ["Family", "HfConfig", "Quantization", "parse_config"]

Family = Literal["bitnet", "1bitllm", "llama", "own"]
MAX_POSITIONS = 1 << 24
OWN_MODEL_TYPE = "bitnet_ext"
ACTIVATIONS = {
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
}


@dataclass(frozen=True)
class Quantization:
    """How linears are stored: as ``quantization_config`` says, or as the family implies."""

    linear_class: Literal["bitlinear", "autobitlinear"] = "autobitlinear"
    online: bool = False
    not_converted: tuple[str, ...] | None = None

    def converts(self, module: str) -> bool:
        """Whether the linear of this full name is ternary.

        A pattern matches from the start up to a module boundary, or as a suffix; ".*" stands
        for anything.
        """
        if self.not_converted is None:
            return module != "lm_head"
        return not any(_matches(pattern, module) for pattern in self.not_converted)


@dataclass(frozen=True)
class HfConfig:
    """A parsed config.json."""

    config: BitNetConfig
    family: Family
    quantization: Quantization


def parse_config(raw: dict[str, Any], where: str) -> HfConfig:
    """Understand a config.json object.

    Raises:
        UnsupportedModelError: another architecture, activation, rope or quantisation.
        CheckpointError: a key holds what it cannot hold.
    """
    fields = Fields(raw, where)
    family = _family(fields)
    try:
        if family == "own":
            return HfConfig(_own_config(fields), family, Quantization())
        quantization = _quantization(fields, family)
        return HfConfig(_config(fields, family, quantization), family, quantization)
    except InvalidShapeError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _family(fields: Fields) -> Family:
    model_type = fields.text("model_type", "")
    names = fields.values.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise fields.fail("architectures", "a list of names")
    if model_type == OWN_MODEL_TYPE:
        return "own"
    if "BitnetForCausalLM" in names:
        return "1bitllm"
    if model_type == "bitnet" or "BitNetForCausalLM" in names:
        return "bitnet"
    if model_type == "llama" or "LlamaForCausalLM" in names:
        return "llama"
    raise UnsupportedModelError(
        f"{fields.where}: found model_type {model_type[:80]!r} with architectures "
        f"{str(names)[:120]}, wanted bitnet, llama (ternary), BitnetForCausalLM or "
        f"{OWN_MODEL_TYPE}: this model's layers are not known here"
    )


def _quantization(fields: Fields, family: Family) -> Quantization:
    section = fields.section("quantization_config")
    if section is None:
        if family == "1bitllm":  # its own model code quantises the latent weights
            return Quantization(online=True)
        raise UnsupportedModelError(
            f"{fields.where}: found no quantization_config, so its linear layers are not "
            'ternary; for latent BitNet weights add {"quant_method": "bitnet", '
            '"linear_class": "autobitlinear", "quantization_mode": "online"}'
        )
    method = section.text("quant_method", "")
    if method != "bitnet":
        raise UnsupportedModelError(
            f"{section.where}: found quant_method {method[:80]!r}, wanted 'bitnet': only ternary "
            "weights run here"
        )
    linear_class = section.choice("linear_class", ("bitlinear", "autobitlinear"), "bitlinear")
    mode = section.choice("quantization_mode", ("offline", "online"), "offline")
    skipped = section.values.get("modules_to_not_convert")
    if skipped is not None and not (
        isinstance(skipped, list) and all(isinstance(s, str) for s in skipped)
    ):
        raise section.fail("modules_to_not_convert", "a list of module names")
    return Quantization(
        cast(Literal["bitlinear", "autobitlinear"], linear_class),
        mode == "online" and linear_class == "autobitlinear",
        None if skipped is None else tuple(skipped),
    )


def _matches(pattern: str, module: str) -> bool:
    if len(pattern) > 256 or pattern.count(".*") > 4:
        raise UnsupportedModelError(
            f"config.json: modules_to_not_convert: the pattern {pattern[:80]!r} is too intricate; "
            "name the modules"
        )
    if module.endswith(pattern):
        return True
    literal = ".*".join(re.escape(part) for part in pattern.split(".*"))
    return re.match(rf"(?:{literal})(?:(?<=\.)|(?=\.|$))", module) is not None


def _config(fields: Fields, family: Family, quantization: Quantization) -> BitNetConfig:
    """The keys that BitNet and Llama share; a missing key has transformers' default."""
    bitnet = family == "bitnet"
    hidden = fields.size("hidden_size", 2560 if bitnet else 4096)
    heads = fields.size("num_attention_heads", 20 if bitnet else 32)
    default_kv = 5 if bitnet and "num_key_value_heads" not in fields.values else heads
    if fields.values.get("head_dim") is None and hidden % heads:
        raise fields.fail("num_attention_heads", f"a divisor of hidden_size = {hidden}")
    section = fields.section("quantization_config") or Fields({}, fields.where)
    max_positions = fields.size("max_position_embeddings", 2048, high=MAX_POSITIONS)
    theta, scaling = _rope(fields, 500000.0 if bitnet else 10000.0, max_positions)
    config = BitNetConfig(
        vocab_size=fields.size("vocab_size", 128256 if bitnet else 32000),
        hidden_size=hidden,
        intermediate_size=fields.size("intermediate_size", 6912 if bitnet else 11008),
        num_layers=fields.size("num_hidden_layers", 30 if bitnet else 32),
        num_heads=heads,
        num_kv_heads=fields.size("num_key_value_heads", default_kv),
        head_dim=fields.size("head_dim", hidden // heads),
        max_position_embeddings=max_positions,
        norm_eps=fields.number("rms_norm_eps", 1e-5 if bitnet else 1e-6, high=1.0),
        hidden_act=_activation(fields, "relu2" if bitnet else "silu"),
        attn_sub_norm=family != "llama",
        ffn_sub_norm=family != "llama",
        attention_bias=fields.flag("attention_bias", False),
        ffn_bias=family == "llama" and fields.flag("mlp_bias", False),
        rope_theta=theta,
        rope_scaling=scaling,
        linear_norm=section.flag("use_rms_norm", False),
        linear_norm_eps=section.number("rms_norm_eps", 1e-6, high=1.0),
        scale_rule="divide" if quantization.linear_class == "bitlinear" else "multiply",
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        bos_token_id=fields.token_id("bos_token_id"),
        eos_token_ids=fields.token_ids("eos_token_id"),
        pad_token_id=fields.token_id("pad_token_id"),
        model_type="llama" if family == "llama" else "bitnet",
    )
    if config.attn_sub_norm and config.q_size != hidden:
        raise fields.fail("head_dim", f"heads x head_dim = hidden_size = {hidden}")
    return config


def _activation(fields: Fields, default: str) -> Literal["relu2", "silu", "gelu", "gelu_tanh"]:
    name = fields.text("hidden_act", default)
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"{fields.where}: hidden_act: found {name[:80]!r}, wanted one of "
            + ", ".join(ACTIVATIONS)
        )
    return cast(Literal["relu2", "silu", "gelu", "gelu_tanh"], ACTIVATIONS[name])


def _rope(fields: Fields, theta: float, context: int) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling: rope_parameters, else rope_scaling beside rope_theta."""
    section = fields.section("rope_parameters") or fields.section("rope_scaling")
    theta = fields.number("rope_theta", theta, low=1.0)
    if section is None:
        return theta, None
    theta = section.number("rope_theta", theta, low=1.0)
    for holder in (fields, section):
        if holder.number("partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedModelError(
                f"{holder.where}: partial_rotary_factor: found "
                f"{holder.values['partial_rotary_factor']}, wanted 1: partly rotated heads "
                "do not run here"
            )
    kind = section.text("rope_type", section.text("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", section.number("factor", low=1e-3))
    if kind != "llama3":
        raise UnsupportedModelError(
            f"{section.where}: found rope type {kind[:80]!r}, wanted default, linear or llama3"
        )
    low = section.number("low_freq_factor", low=1e-3)
    high = section.number("high_freq_factor", low=1e-3)
    if high <= low:
        raise section.fail("high_freq_factor", f"more than low_freq_factor = {low}")
    original = section.size("original_max_position_embeddings", context)
    return theta, RopeScaling("llama3", section.number("factor", low=1e-3), low, high, original)


def _own_config(fields: Fields) -> BitNetConfig:
    """The package's own form: BitNetConfig's fields under their own names."""
    norm = fields.choice("norm", ("rms", "layer"), "rms")
    position = fields.choice("position", ("rope", "learned"), "rope")
    theta, scaling = _rope(fields, 500000.0, 8192)
    rule = fields.choice("scale_rule", ("multiply", "divide"), "multiply")
    return BitNetConfig(
        vocab_size=fields.size("vocab_size"),
        hidden_size=fields.size("hidden_size"),
        intermediate_size=fields.size("intermediate_size"),
        num_layers=fields.size("num_layers"),
        num_heads=fields.size("num_heads"),
        num_kv_heads=fields.size("num_kv_heads"),
        head_dim=fields.size("head_dim"),
        max_position_embeddings=fields.size("max_position_embeddings", high=MAX_POSITIONS),
        norm=cast(Literal["rms", "layer"], norm),
        norm_eps=fields.number("norm_eps", 1e-5, high=1.0),
        hidden_act=_activation(fields, "relu2"),
        gated_ffn=fields.flag("gated_ffn", True),
        ffn_norm=fields.flag("ffn_norm", True),
        attn_sub_norm=fields.flag("attn_sub_norm", True),
        ffn_sub_norm=fields.flag("ffn_sub_norm", True),
        attention_bias=fields.flag("attention_bias", False),
        ffn_bias=fields.flag("ffn_bias", False),
        head_bias=fields.flag("head_bias", False),
        fused_qkv=fields.flag("fused_qkv", False),
        position=cast(Literal["rope", "learned"], position),
        rope_theta=theta,
        rope_scaling=scaling,
        linear_norm=fields.flag("linear_norm", False),
        linear_norm_eps=fields.number("linear_norm_eps", 1e-6, high=1.0),
        scale_rule=cast(Literal["multiply", "divide"], rule),
        tie_word_embeddings=fields.flag("tie_word_embeddings", True),
        bos_token_id=fields.token_id("bos_token_id"),
        eos_token_ids=fields.token_ids("eos_token_ids"),
        pad_token_id=fields.token_id("pad_token_id"),
        model_type=OWN_MODEL_TYPE,
    )
