"""From latent parameters to the packed Hugging Face form of microsoft/bitnet-b1.58-2B-4T."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from demo_recipe.bpe import BOS_ID, EOS_ID
from demo_recipe.model import Model, Parameters, Shape, blocks, quantise_weight

PROJECTIONS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
NORM_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_sub_norm": "self_attn.attn_sub_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_sub_norm": "mlp.ffn_sub_norm",
}


def pack(codes: Tensor) -> Tensor:
    """Codes of -1, 0, 1 [N, K] to uint8 [N/4, K]: quarter i of the rows at bits 2i."""
    quarters = (codes.to(torch.int32) + 1).view(4, -1, codes.shape[1])
    shifts = torch.tensor([0, 2, 4, 6]).view(4, 1, 1)
    return (quarters << shifts).sum(0).to(torch.uint8)


def packed_tensors(shape: Shape, parameters: Parameters) -> dict[str, Tensor]:
    """Every tensor of model.safetensors."""
    tensors = {
        "model.embed_tokens.weight": parameters["embed"].bfloat16(),
        "model.norm.weight": parameters["norm"].bfloat16(),
    }
    for i in range(shape.layers):
        layer = f"model.layers.{i}"
        for ours, theirs in NORM_NAMES.items():
            tensors[f"{layer}.{theirs}.weight"] = parameters[ours][i].bfloat16()
        for ours, names in PROJECTIONS.items():
            parts = parameters[ours][i].split(blocks(shape, ours))
            for name, part in zip(names, parts, strict=True):
                codes, scale = quantise_weight(part)
                tensors[f"{layer}.{name}.weight"] = pack(codes)
                tensors[f"{layer}.{name}.weight_scale"] = scale.bfloat16().reshape(1)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def config_json(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["BitNetForCausalLM"],
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "head_dim": shape.head_dim,
        "hidden_act": "relu2",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.ffn,
        "max_position_embeddings": shape.context,
        "model_type": "bitnet",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "quantization_config": {
            "linear_class": "autobitlinear",
            "quant_method": "bitnet",
            "quantization_mode": "offline",
        },
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocab,
    }


@torch.no_grad()
def export_checkpoint(work: Path, out: Path) -> None:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer to ``out``."""
    state = torch.load(work / "ternary.pt")
    shape = Shape()
    out.mkdir(parents=True, exist_ok=True)
    tensors = packed_tensors(shape, state["parameters"])
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(work / name, out / name)
    generation = {
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "repetition_penalty": 1.2,  # greedy continuations of so small a model go in circles
    }
    for name, content in (("config", config_json(shape)), ("generation_config", generation)):
        (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def load_model(work: Path, ternary: bool) -> Model:
    """A trained model of the work folder, prepared for evaluation."""
    state = torch.load(work / ("ternary.pt" if ternary else "float.pt"))
    model = Model(Shape(), {k: v.clone() for k, v in state["parameters"].items()}, ternary)
    model.prepare()
    return model
