"""config.json facts of the published ternary checkpoints, as their repositories state them."""

from __future__ import annotations

from typing import Any

_BITNET_2B_4T: dict[str, Any] = {
    "architectures": ["BitNetForCausalLM"],
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "relu2",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 4096,
    "model_type": "bitnet",
    "num_attention_heads": 20,
    "num_hidden_layers": 30,
    "num_key_value_heads": 5,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}

_LLAMA_TERNARY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "mlp_bias": False,
    "model_type": "llama",
    "pretraining_tp": 1,
    "quantization_config": {"modules_to_not_convert": None, "quant_method": "bitnet"},
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}

PUBLISHED: dict[str, dict[str, Any]] = {
    # microsoft/bitnet-b1.58-2B-4T
    "bitnet": _BITNET_2B_4T
    | {
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "offline",
        }
    },
    # microsoft/bitnet-b1.58-2B-4T-bf16
    "bitnet-bf16": _BITNET_2B_4T
    | {
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "online",
        }
    },
    # 1bitLLM/bitnet_b1_58-large
    "1bitllm": {
        "architectures": ["BitnetForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 1536,
        "initializer_range": 0.02,
        "input_bits": 8,
        "intermediate_size": 4096,
        "max_position_embeddings": 2048,
        "model_type": "llama",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "num_key_value_heads": 16,
        "pad_token_id": 32000,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": 32002,
        "weight_bits": 1,
    },
    # HF1BitLLM/Llama3-8B-1.58-100B-tokens
    "llama3": _LLAMA_TERNARY
    | {
        "bos_token_id": 128000,
        "eos_token_id": 128009,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "vocab_size": 128256,
    },
    # tiiuae/Falcon3-3B-Base-1.58bit
    "falcon3": _LLAMA_TERNARY
    | {
        "bos_token_id": 11,
        "eos_token_id": 11,
        "head_dim": 256,
        "hidden_size": 3072,
        "intermediate_size": 9216,
        "max_position_embeddings": 8192,
        "num_attention_heads": 12,
        "num_hidden_layers": 22,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000042,
        "vocab_size": 131072,
    },
    # tiiuae/Falcon-E-1B-Base: its sizes are inferred, its form (Llama, divide) is documented
    "falcon-e": _LLAMA_TERNARY
    | {
        "bos_token_id": 1,
        "eos_token_id": 11,
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 32768,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "vocab_size": 32768,
    },
    # No published model: a norm inside each linear, Llama-3 scaling, the newer rope spelling.
    "llama-rms": _LLAMA_TERNARY
    | {
        "bos_token_id": 0,
        "dtype": "float32",
        "eos_token_id": [1, 2],
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "num_attention_heads": 16,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "quantization_config": {
            "linear_class": "autobitlinear",
            "modules_to_not_convert": ["lm_head"],
            "quant_method": "bitnet",
            "quantization_mode": "offline",
            "rms_norm_eps": 1e-06,
            "use_rms_norm": True,
        },
        "rms_norm_eps": 1e-05,
        "rope_parameters": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_theta": 500000.0,
            "rope_type": "llama3",
        },
        "vocab_size": 128256,
    },
    # GPT-2 shape with ternary linears: the package's own form, GPT-2 small's sizes.
    "gpt2": {
        "architectures": ["BitNetExtForCausalLM"],
        "model_type": "bitnet_ext",
        "vocab_size": 50257,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_layers": 12,
        "num_heads": 12,
        "num_kv_heads": 12,
        "head_dim": 64,
        "max_position_embeddings": 1024,
        "norm": "layer",
        "norm_eps": 1e-05,
        "hidden_act": "gelu_tanh",
        "gated_ffn": False,
        "ffn_norm": True,
        "attn_sub_norm": False,
        "ffn_sub_norm": False,
        "attention_bias": True,
        "ffn_bias": True,
        "head_bias": False,
        "fused_qkv": True,
        "position": "learned",
        "linear_norm": False,
        "scale_rule": "multiply",
        "tie_word_embeddings": True,
        "bos_token_id": 50256,
        "eos_token_ids": [50256],
        "dtype": "float32",
    },
}
