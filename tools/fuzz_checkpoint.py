"""Feed damaged checkpoints to every reader; each must load or raise CheckpointError.

    python tools/fuzz_checkpoint.py --count 10000

Inputs are made by tools/fuzz_mutations.py from (reader, number), so a failure is found again with
``--reader gguf --start 1234 --count 1``.  Under the sanitizers::

    BUILD_DIR=build/asan tools/dev_build.sh -DBITNET_SANITIZE=ON
    LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" \
    ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=16 python tools/fuzz_checkpoint.py

Exit status 1 where an input raised anything else, memory grew past its bound, or fewer than half
of a reader's inputs got past the header.
"""

from __future__ import annotations

import argparse
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]

import fuzz_mutations as damage  # noqa: E402
from hostile import load_fully  # noqa: E402
from make_checkpoints import make_hf  # noqa: E402
from make_gguf import ARRAY, F32, I32, STRING, U8, Gguf, make_gguf  # noqa: E402

from bitnet_ext.checkpoint.files import load_json, resolve_inside  # noqa: E402
from bitnet_ext.checkpoint.gguf import GgufFile  # noqa: E402
from bitnet_ext.checkpoint.hf_config import parse_config  # noqa: E402
from bitnet_ext.checkpoint.safetensors import TensorStore  # noqa: E402
from bitnet_ext.errors import CheckpointError  # noqa: E402

GROWTH_MIB = 192  # what a reader may add to the memory of the process


@dataclass
class Reader:
    """A reader's samples, the damage done to them, and its two stages."""

    samples: list[Any]
    make: Callable[[random.Random, Any, Path], None]
    header: Callable[[Path], Any]
    load: Callable[[Path], Any]


@dataclass
class Result:
    """What became of a reader's inputs."""

    inputs: int = 0
    past_header: int = 0
    loaded: int = 0
    failures: list[tuple[int, str]] = field(default_factory=list)
    messages: Counter[str] = field(default_factory=Counter)
    growth_mib: float = 0.0
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        """Nothing but CheckpointError, bounded memory, and enough inputs past the header."""
        deep = 2 * self.past_header >= self.inputs
        return not self.failures and deep and self.growth_mib < GROWTH_MIB


def _hf_samples(folder: Path) -> list[Any]:
    samples = []
    small = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 16, "head_dim": 16}
    for family in ("bitnet", "bitnet-bf16", "llama3", "llama-rms", "1bitllm"):
        made = make_hf(folder / family, family, layers=1, tokenizer=False, **small)
        samples.append(damage.Hf.read(made.path))
    changes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "head_bias": True}
    changes |= {"max_position_embeddings": 32}
    made = make_hf(folder / "gpt2", "gpt2", layers=1, vocab_size=16, tokenizer=False, **changes)
    return [*samples, damage.Hf.read(made.path)]


def gguf_parts(path: Path, *, vocabulary: bool) -> Gguf:
    """A GGUF file taken apart into what writes it again."""
    read = GgufFile(path)
    file = Gguf()
    for key, value in read.metadata.items():
        if vocabulary or not key.startswith("tokenizer.ggml.t"):
            file.keys.append((key, *_typed(value)))
    for tensor in read.tensors.values():
        data = read.raw(tensor.name).tobytes()
        file.tensors.append((tensor.name, tensor.type, tensor.shape, data))
    return file


def _typed(value: Any) -> tuple[int, Any]:
    """A metadata value with its type number, as make_gguf.Gguf holds them."""
    if isinstance(value, bool):
        return 7, value
    if isinstance(value, int):
        return 4, value
    if isinstance(value, float):
        return F32, value
    if isinstance(value, str):
        return STRING, value
    if isinstance(value, list):
        return ARRAY, (STRING, value)
    return ARRAY, ({"f": F32, "u": U8, "i": I32}[value.dtype.kind], value.tolist())


def _gguf_samples(folder: Path) -> list[Any]:
    samples = []
    for i, (arch, weights, table) in enumerate(
        [
            ("bitnet-b1.58", "i2_s", "q6_k"),
            ("bitnet", "tq1_0", "q8_0"),
            ("llama", "tq2_0", "q4_0"),
            ("bitnet-25", "bf16", "q4_k"),
            ("llama", "f16", "f16"),
        ]
    ):
        path = folder / f"{i}.gguf"
        make_gguf(path, arch, weights=weights, embedding=table, vocab_size=320, layers=1)
        samples.append(gguf_parts(path, vocabulary=False))
    return samples


def _vocabulary_samples(folder: Path) -> list[Any]:
    make_gguf(folder / "v.gguf", weights="i2_s", vocab_size=320, layers=1)
    byte_level = gguf_parts(folder / "v.gguf", vocabulary=True)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += ["\u2581", *"etaoin", "\u2581t", "he", "\u2581the", "in", "an"]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(pieces) - 259)]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces) - 259)]
    scored = Gguf([k for k in byte_level.keys if not k[0].startswith("tokenizer.ggml.")])
    scored.tensors = byte_level.tensors
    scored.keys += [
        ("tokenizer.ggml.model", STRING, "llama"),
        ("tokenizer.ggml.tokens", ARRAY, (STRING, pieces)),
        ("tokenizer.ggml.scores", ARRAY, (F32, scores)),
        ("tokenizer.ggml.token_type", ARRAY, (I32, types)),
        ("tokenizer.ggml.bos_token_id", 4, 1),
        ("tokenizer.ggml.eos_token_id", 4, 2),
    ]
    return [byte_level, scored]


def _config_header(directory: Path) -> None:
    parse_config(load_json(resolve_inside(directory, "config.json")), str(directory))


def _vocabulary(path: Path) -> None:
    """The tokenizer alone; one that loads must turn text into ids and back."""
    from bitnet_ext.checkpoint import open_checkpoint
    from bitnet_ext.generate.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_checkpoint(open_checkpoint(path))
    tokenizer.decode(tokenizer.encode("the quick 123 \u00e9\U0001f600\n"))


def readers(folder: Path) -> dict[str, Reader]:
    """All readers; samples are written under ``folder`` first."""
    hf = _hf_samples(folder)
    return {
        "safetensors": Reader(hf, damage.safetensors_input, TensorStore, load_fully),
        "config": Reader(hf, damage.config_input, _config_header, load_fully),
        "gguf": Reader(_gguf_samples(folder), damage.gguf_input, GgufFile, load_fully),
        "vocabulary": Reader(
            _vocabulary_samples(folder), damage.vocabulary_input, GgufFile, _vocabulary
        ),
    }


def fuzz(name: str, reader: Reader, folder: Path, start: int, count: int) -> Result:
    """Inputs ``start`` to ``start + count`` of a reader."""
    result = Result()
    single = name in ("gguf", "vocabulary")
    target = folder / ("input.gguf" if single else "input")
    if not single:
        target.mkdir(exist_ok=True)
    began, memory = time.monotonic(), 0
    for number in range(start, start + count):
        rng = random.Random(f"{name}:{number}")
        reader.make(rng, rng.choice(reader.samples), target)
        result.inputs += 1
        try:
            reader.header(target)
            result.past_header += 1
            reader.load(target)
            result.loaded += 1
        except CheckpointError as error:
            kind = type(error).__name__
            result.messages[f"{kind}: {str(error).removeprefix(str(target))[:60]}"] += 1
        # A panic of the tokenizers library is a BaseException, and a failure like any other.
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            result.failures.append((number, "".join(traceback.format_exception(error))))
        if number - start == min(100, count // 4):
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result.growth_mib = (peak - memory) / 1024
    result.seconds = time.monotonic() - began
    return result


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder in memory where there is one."""
    base = "/dev/shm" if Path("/dev/shm").is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=base))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def main() -> int:
    """Run the readers asked for and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ["safetensors", "config", "gguf", "vocabulary"]
    parser.add_argument("--reader", choices=names, action="append", help="default: all")
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--count", type=int, default=10_000)
    arguments = parser.parse_args()
    warnings.simplefilter("error")
    good = True
    with scratch() as folder:
        every = readers(folder)
        for name in arguments.reader or names:
            result = fuzz(name, every[name], folder, arguments.start, arguments.count)
            good &= result.good
            print(
                f"{name}: {result.inputs} inputs, {result.past_header} past the header, "
                f"{result.loaded} loaded, {len(result.failures)} failures, memory grew by "
                f"{result.growth_mib:.0f} MiB, {len(result.messages)} messages, "
                f"{result.seconds:.0f} s",
                flush=True,
            )
            for number, text in result.failures[:3]:
                print(f"--- {name} --start {number} --count 1\n{text}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
