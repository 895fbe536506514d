"""Text in, text out: tokenizers, chat templates, sampling and the generation loop."""

from bitnet_ext.generate.config import GenerationConfig
from bitnet_ext.generate.loop import GenerationStream, chat, generate
from bitnet_ext.generate.output import (
    GenerationChunk,
    GenerationOutput,
    Timings,
    TokenLogprobs,
)

__all__ = [
    "GenerationChunk",
    "GenerationConfig",
    "GenerationOutput",
    "GenerationStream",
    "Timings",
    "TokenLogprobs",
    "chat",
    "generate",
]
