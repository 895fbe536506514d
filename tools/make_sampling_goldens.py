"""Write tests/data/sampling_goldens.json: what the logits processors of transformers leave over.

python tools/make_sampling_goldens.py        # needs transformers and torch
"""

import json
import random
from pathlib import Path

import torch
import transformers
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

PATH = Path(__file__).resolve().parent.parent / "tests/data/sampling_goldens.json"
VOCAB = 24


def case(rng: random.Random) -> dict[str, object]:
    logits = [round(rng.gauss(0, 3), 3) for _ in range(VOCAB)]
    seen = rng.sample(range(VOCAB), 5)
    settings = {
        "penalty": rng.choice([1.0, 1.3, 0.8]),
        "temperature": rng.choice([0.5, 1.0, 1.7]),
        "top_k": rng.choice([0, 3, 10]),
        "top_p": rng.choice([1.0, 0.9, 0.5]),
        "min_p": rng.choice([0.0, 0.05, 0.3]),
    }
    processors = [
        RepetitionPenaltyLogitsProcessor(settings["penalty"]),
        TemperatureLogitsWarper(settings["temperature"]),
    ]
    if settings["top_k"]:
        processors.append(TopKLogitsWarper(settings["top_k"]))
    if settings["top_p"] < 1:
        processors.append(TopPLogitsWarper(settings["top_p"]))
    if settings["min_p"]:
        processors.append(MinPLogitsWarper(settings["min_p"]))
    scores = torch.tensor([logits], dtype=torch.float64)
    for processor in processors:
        scores = processor(torch.tensor([seen]), scores)
    probabilities = [round(p, 10) for p in scores.softmax(-1)[0].tolist()]
    return {"logits": logits, "seen": seen, **settings, "probabilities": probabilities}


if __name__ == "__main__":
    rng = random.Random(0)
    golden = {"transformers": transformers.__version__, "cases": [case(rng) for _ in range(60)]}
    PATH.write_text(json.dumps(golden, indent=None, separators=(",", ":")) + "\n")
