"""The numbers of the GGUF format that this package needs.

A table of our own: the gguf package rejects type 36 and brings more than is wanted here.
"""

from __future__ import annotations

__all__ = [
    "ALIGNMENT",
    "ARCHITECTURES",
    "ARRAY",
    "BLOCKS",
    "BOOL",
    "I2_S",
    "I2_S_TAIL",
    "MAGIC",
    "SCALARS",
    "STRING",
    "TYPE_NAMES",
]

MAGIC = b"GGUF"
NO_TOKENIZER = "none"  # tokenizer.ggml.model of a file that takes token ids only
ALIGNMENT = 32  # where general.alignment is absent

# Metadata value types: number -> NumPy dtype of the scalars.
SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
BOOL, STRING, ARRAY = 7, 8, 9

I2_S = 36  # Microsoft's fork and ik_llama.cpp
I2_S_TAIL = 32  # bytes behind the codes: float32 scale, the rest undefined

# Tensor types: number -> (name, elements per block, bytes per block).
BLOCKS = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
}
# Names for messages alone: types whose size is not known here.
TYPE_NAMES = {number: name for number, (name, _, _) in BLOCKS.items()} | {
    9: "Q8_1",  # only ever in memory; writers disagree about its size
    I2_S: "I2_S",
    37: "I8_S",
    38: "TL1",
    39: "TL2 (or MXFP4)",
    40: "NVFP4",
    41: "Q1_0",
}

# general.architecture -> hidden activation of the feed-forward layer.
ARCHITECTURES = {
    "bitnet": "silu",
    "bitnet-25": "relu2",
    "bitnet-b1.58": "relu2",
    "llama": "silu",
}
