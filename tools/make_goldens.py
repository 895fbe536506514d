"""Ask stock transformers, in float32, for the logits of small checkpoints of every family.

    TORCHDYNAMO_DISABLE=1 PYTHONPATH=.:tests python tools/make_goldens.py [case ...]

Needs the built extension, torch, transformers and accelerate. Writes tests/goldens/<case>.npz
(logits float32 [seeds, tokens, vocab]) and tests/goldens/transformers.json: versions, the largest
error of each seed relative to its largest logit, and, for each row beyond 1e-5, the flips that
explain it: an activation that stood next to a half-integer in the int8 quantiser and fell the
other way. Latent weights have flips of their own: float32's mean(|W|) depends on the order of its
sum, and a weight next to half of it falls either way. An error that no flip explains stops the
tool.

1bitLLM's class lives in its repository's own code: its tensors are renamed for BitNetForCausalLM,
which computes the same. GPT-2 has no ternary class: its Conv1D modules are replaced by
transformers' BitLinear.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import numpy as np
import torch
import transformers
from golden_cases import (
    CASES,
    DEMO_COLUMNS,
    GOLDENS,
    SEEDS,
    case_ids,
    demo_ids,
    make_case,
    quantised_inputs,
)
from make_checkpoints import Made, write_tensors
from safetensors.torch import load_file
from transformers.integrations.bitnet import AutoBitLinear, BitLinear

import bitnet_ext
from bitnet_ext import BitNetModel

EXACT = 1e-5  # of the largest logit
# How near a half-integer a value must stand to fall either way.
NEAR_HALF = 2e-5
NEAR_HALF_WEIGHT = 1e-6


def rename_1bitllm(made: Made) -> Path:
    """The same weights under BitNetForCausalLM's names."""
    target = made.path / "renamed"
    target.mkdir()
    tensors = {}
    for name, tensor in load_file(made.path / "model.safetensors").items():
        name = name.replace("inner_attn_ln", "attn_sub_norm").replace(
            "ffn_layernorm", "ffn_sub_norm"
        )
        tensors[name] = ("F32", tuple(tensor.shape), tensor.numpy().tobytes())
    write_tensors(target, tensors)
    config = made.config | {
        "architectures": ["BitNetForCausalLM"],
        "model_type": "bitnet",
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "online",
        },
    }
    (target / "config.json").write_text(json.dumps(config))
    return target


def ternary_gpt2(made: Made) -> torch.nn.Module:
    """GPT2LMHeadModel with BitLinear in place of every Conv1D."""
    c = made.config
    config = transformers.GPT2Config(
        vocab_size=c["vocab_size"],
        n_positions=c["max_position_embeddings"],
        n_embd=c["hidden_size"],
        n_layer=c["num_layers"],
        n_head=c["num_heads"],
        n_inner=c["intermediate_size"],
        activation_function="gelu_new",
        layer_norm_epsilon=c["norm_eps"],
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    tensors = load_file(made.path / "model.safetensors")
    model.transformer.wte.weight.data = tensors["embed.weight"]
    model.transformer.wpe.weight.data = tensors["positions.weight"]
    model.tie_weights()
    norms = {"transformer.ln_f": "final_norm"}
    for i in range(c["num_layers"]):
        ours, theirs = f"layers.{i}.", f"transformer.h.{i}."
        norms |= {theirs + "ln_1": ours + "attn_norm", theirs + "ln_2": ours + "ffn_norm"}
        names = {"attn.c_attn": "qkv", "attn.c_proj": "o", "mlp.c_fc": "up", "mlp.c_proj": "down"}
        for module, name in names.items():
            weight = tensors[ours + name + ".weight"]
            linear = BitLinear(weight.shape[1], weight.shape[0] * 4, True, dtype=torch.float32)
            linear.weight = weight
            linear.weight_scale = tensors[ours + name + ".weight_scale"]
            linear.bias = tensors[ours + name + ".bias"]
            model.set_submodule(theirs + module, linear)
    for module, name in norms.items():
        norm = model.get_submodule(module)
        norm.weight.data, norm.bias.data = tensors[name + ".weight"], tensors[name + ".bias"]
    return model


def load_oracle(made: Made, path: Path | None = None) -> torch.nn.Module:
    """The model as transformers runs it, in float32."""
    if made.family == "gpt2":
        return ternary_gpt2(made)
    path = path or (rename_1bitllm(made) if made.family == "1bitllm" else made.path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    # autobitlinear keeps norms and tables in their stored dtype, whatever `dtype` says
    return torch.nn.Module.float(model).eval()


def ask(model: torch.nn.Module, ids: list[int]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits [T, V], and x * s of every linear layer in the order that bitnet_ext computes."""
    scaled: dict[str, np.ndarray] = {}

    def hook(name: str) -> Any:
        def record(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0] if module.rms_norm is None else module.rms_norm(args[0])
            scale = 127 / x.abs().max(dim=-1, keepdim=True).values.clamp(min=1e-5)
            scaled[name] = (x * scale)[0].numpy()

        return record

    handles = []
    own_norms = False
    for name, module in model.named_modules():
        if isinstance(module, (AutoBitLinear, BitLinear)):
            own_norms |= module.rms_norm is not None
            handles.append(module.register_forward_pre_hook(hook(name)))
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].numpy()
    for handle in handles:
        handle.remove()
    shared = () if own_norms else ("k_proj", "v_proj", "up_proj")  # quantised with q and gate
    return logits, [x for name, x in scaled.items() if not name.endswith(shared)]


def weight_flips(model: BitNetModel, oracle: torch.nn.Module) -> list[dict[str, Any]]:
    """Latent weights that the two quantise differently."""
    theirs = [m for m in oracle.modules() if isinstance(m, AutoBitLinear) and m.online_quant]
    ours = []
    for layer in model._engine.weights.layers if theirs else ():
        for group in (layer.qkv, (layer.o,), layer.gate_up, (layer.down,)):
            ours += [part.weight.unpack() for part in group]
    found = []
    for name, codes in enumerate(ours):
        rows = 0
        scaled = []
        while rows < len(codes):  # q, k, v and gate, up stand in one matrix of ours
            weight = theirs.pop(0).weight.detach()
            scaled.append((weight * (1.0 / weight.abs().mean().clamp_(min=1e-5))).numpy())
            rows += len(weight)
        values = np.concatenate(scaled)
        for n, k in np.argwhere(codes != np.clip(np.rint(values), -1, 1)):
            place = {"matrix": name, "row": int(n), "column": int(k)}
            found.append(place | {"value": float(values[n, k]), "ours": int(codes[n, k])})
    return found


def flips_of(ours: list[np.ndarray], theirs: list[np.ndarray], row: int) -> list[dict[str, Any]]:
    """The differing values at the first linear layer where anything up to ``row`` differs."""
    for site, (q, x) in enumerate(zip(ours, theirs, strict=True)):
        other = np.clip(np.rint(x), -128, 127)
        places = np.argwhere(q[: row + 1] != other[: row + 1])
        if len(places):
            return [
                {
                    "linear": site,
                    "row": int(r),
                    "column": int(k),
                    "value": float(x[r, k]),
                    "ours": int(q[r, k]),
                }
                for r, k in places
            ]
    return []


def compare(model: BitNetModel, oracle: torch.nn.Module, ids: list[int]) -> dict[str, Any]:
    """Error of every row and what explains those beyond the bound."""
    weights = weight_flips(model, oracle)
    if any(abs(abs(f["value"]) - 0.5) > NEAR_HALF_WEIGHT for f in weights):
        raise SystemExit(f"weights quantised differently: {weights}")
    logits, scaled = ask(oracle, ids)
    with quantised_inputs(model) as seen:
        found = model.forward_full(ids)
    largest = float(np.abs(logits).max())
    error = np.abs(found - logits).max(-1) / largest
    rows = {}
    for row in np.flatnonzero(error > EXACT).tolist() if not weights else ():
        flips = flips_of(seen, scaled, row)
        off = [abs(abs(f["value"] - np.floor(f["value"])) - 0.5) for f in flips]
        if not flips or max(off) > NEAR_HALF:
            raise SystemExit(f"row {row}: error {error[row]:.2e} that no flip explains: {flips}")
        rows[str(row)] = flips
    return {"logits": logits, "error": float(error.max()), "flips": rows, "weight_flips": weights}


def run_case(name: str, work: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Logits of all seeds, and their record."""
    logits, seeds = [], []
    for seed in range(SEEDS):
        directory = work / f"{name}-{seed}"
        made = make_case(name, seed, directory)
        model = BitNetModel.from_pretrained(directory)
        result = compare(model, load_oracle(made), case_ids(seed))
        logits.append(result.pop("logits"))
        if made.family != "gpt2":
            saved = directory / "saved"
            model.save_pretrained(saved)
            again = compare(model, load_oracle(made, saved), case_ids(seed))
            result["saved_error"] = again["error"]
            result["saved_flips"] = again["flips"]
        seeds.append(result)
    free = [s for s in seeds if not s["flips"] and not s["weight_flips"]]
    exact = max(s["error"] for s in free)
    print(f"{name:16} free of flips {len(free)}/{SEEDS}, largest error without a flip {exact:.1e}")
    return np.stack(logits), {"seeds": seeds}


def run_demo() -> tuple[np.ndarray, dict[str, Any]]:
    """The shipped demo on pieces of real text, and one long text whose flips are all explained."""
    model = BitNetModel.from_pretrained("demo")
    path = Path(bitnet_ext.__file__).parent / "demo"
    oracle = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    oracle = torch.nn.Module.float(oracle).eval()
    seeds = [compare(model, oracle, demo_ids(seed)) for seed in range(SEEDS)]
    logits = np.stack([s.pop("logits")[:, DEMO_COLUMNS] for s in seeds])
    long = compare(model, oracle, [t for seed in range(SEEDS) for t in demo_ids(seed)])
    del long["logits"]
    free = [s for s in seeds if not s["flips"]]
    exact = max(s["error"] for s in free)
    print(
        f"{'demo':16} free of flips {len(free)}/{SEEDS}, largest error without a flip {exact:.1e}"
    )
    return logits, {"seeds": seeds, "long": long}


def main() -> None:
    wanted = sys.argv[1:] or [*CASES, "demo"]
    file = GOLDENS / "transformers.json"
    cases = json.loads(file.read_text())["cases"] if file.exists() else {}
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "made_by": "tools/make_goldens.py",
        "date": date.today().isoformat(),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "cases": cases,
    }
    with tempfile.TemporaryDirectory() as work:
        for name in wanted:
            logits, cases[name] = run_demo() if name == "demo" else run_case(name, Path(work))
            np.savez_compressed(GOLDENS / f"{name}.npz", logits=logits)
    file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
