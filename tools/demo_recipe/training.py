"""The training loop: a schedule over wall-clock time, written down so that the twin repeats it."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from demo_recipe.bpe import BOS_ID, EOS_ID
from demo_recipe.corpus import Text, load_part
from demo_recipe.evaluation import bits_per_byte
from demo_recipe.model import Model, Shape, initial_parameters
from demo_recipe.muon import Optimiser

BLOCK = 1024  # tokens of one forward and backward: its activations stay in the cache
PARTS = 6  # documentation and tests come in turns, a sixth in each epoch
SAVE_SECONDS = 400


class Stream:
    """Blocks of BLOCK + 1 tokens by number: an epoch is the library and a part of the rest."""

    def __init__(self, texts: list[Text], tokenizer: Tokenizer, seed: int) -> None:
        encoded = tokenizer.encode_batch([t.text for t in texts])
        self._tokens = [np.array([*e.ids, EOS_ID], np.int16) for e in encoded]
        assert all(t[0] == BOS_ID for t in self._tokens)
        self._always = [i for i, t in enumerate(texts) if t.source == "lib"]
        rest = [i for i, t in enumerate(texts) if t.source != "lib"]
        self._parts = [rest[part::PARTS] for part in range(PARTS)]
        self._seed, self._first, self._next, self._epoch = seed, 0, 0, -1
        self._advance()

    def _advance(self) -> None:
        self._epoch += 1
        rng = np.random.default_rng([self._seed, self._epoch])
        order = rng.permutation(self._always + self._parts[self._epoch % PARTS])
        joined = np.concatenate([self._tokens[i] for i in order])
        count = (len(joined) - 1) // BLOCK
        self._blocks = np.stack([joined[i * BLOCK : (i + 1) * BLOCK + 1] for i in range(count)])
        rng.shuffle(self._blocks)
        self._first, self._next = self._next, self._next + count

    def block(self, number: int) -> Tensor:
        while number >= self._next:
            self._advance()
        return torch.from_numpy(self._blocks[number - self._first].astype(np.int64))


@dataclass(frozen=True)
class Step:
    """What one step does; one JSON line of schedule.jsonl."""

    number: int
    progress: float
    rate: float
    decay: float
    length: int
    first_block: int
    blocks: int


def plan(number: int, first_block: int, progress: float) -> Step:
    """Warm up over 60 steps, then linear to zero; longer sequences later."""
    rate = min((number + 1) / 60, 1.0) * min(1.0, (1.0 - progress) / 0.9)
    length = 256 if progress < 0.5 else 512 if progress < 0.85 else 1024
    return Step(number, progress, rate, float(progress < 0.5), length, first_block, 4)


class Trainer:
    """One model's training in ``folder``; resumes from its last saved state."""

    def __init__(self, folder: Path, ternary: bool, seed: int = 1) -> None:
        self.name = "ternary" if ternary else "float"
        self.folder, shape = folder, Shape()
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.stream = Stream(load_part(folder / "corpus", "train"), self.tokenizer, seed)
        self.validation = load_part(folder / "corpus", "validation")
        self.model = Model(shape, initial_parameters(shape, seed), ternary)
        self.loss = torch.compile(self.model.loss, dynamic=False)
        self.optimiser = Optimiser(shape, self.model.parameters)
        self.step = self.next_block = 0
        self.elapsed = 0.0
        self.stopped = False
        signal.signal(signal.SIGTERM, self._stop)
        self.state_file = folder / f"{self.name}.pt"
        if self.state_file.exists():
            self._load()

    def _stop(self, *_: object) -> None:
        """Ask the loop to save and leave after the step in hand."""
        self.stopped = True

    def _load(self) -> None:
        state = torch.load(self.state_file)
        for name, value in state["parameters"].items():
            self.model.parameters[name].data.copy_(value)
        self.optimiser.state = state["optimiser"]
        self.step, self.next_block = state["step"], state["next_block"]
        self.elapsed = state["elapsed"]

    def save(self) -> None:
        state = {
            "parameters": {k: v.detach() for k, v in self.model.parameters.items()},
            "optimiser": self.optimiser.state,
            "step": self.step,
            "next_block": self.next_block,
            "elapsed": self.elapsed,
        }
        torch.save(state, self.state_file.with_suffix(".tmp"))
        os.replace(self.state_file.with_suffix(".tmp"), self.state_file)

    def run(self, step: Step) -> float:
        """One step; the mean loss in nats per token."""
        self.model.prepare()
        total = 0.0
        tokens = step.blocks * BLOCK
        for number in range(step.first_block, step.first_block + step.blocks):
            block = self.stream.block(number)
            ids, targets = (b.view(-1, step.length) for b in (block[:-1], block[1:]))
            loss = self.loss(ids, targets) / tokens
            loss.backward()
            total += loss.item()
        self.model.collect_gradients()
        self.optimiser.step(step.rate, step.decay)
        self.step, self.next_block = step.number + 1, step.first_block + step.blocks
        return total

    def log(self, **values: Any) -> None:
        with (self.folder / f"{self.name}.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")

    def checkpoint(self) -> None:
        """Measure the validation modules, then save."""
        self.model.prepare()
        result = bits_per_byte(self.model, self.tokenizer, self.validation)
        self.log(step=self.step, elapsed=self.elapsed, validation=result["total"])
        self.save()

    def lead(self, minutes: float) -> None:
        """Train for ``minutes`` in all (earlier runs counted in), writing the schedule."""
        begun, saved = time.monotonic() - self.elapsed, self.elapsed
        schedule = self.folder / "schedule.jsonl"
        kept = schedule.read_text().splitlines()[: self.step] if schedule.exists() else []
        schedule.write_text("".join(line + "\n" for line in kept))
        while (progress := self.elapsed / (60 * minutes)) < 1.0:
            step = plan(self.step, self.next_block, progress)
            with schedule.open("a") as file:
                file.write(json.dumps(vars(step)) + "\n")
            loss = self.run(step)
            self.elapsed = time.monotonic() - begun
            if step.number % 10 == 0:
                self.log(step=step.number, progress=progress, elapsed=self.elapsed, loss=loss)
            if self.elapsed - saved > SAVE_SECONDS:
                self.checkpoint()
                saved = self.elapsed
            if self.stopped:
                return self.save()
        self.checkpoint()
        (self.folder / "finished").write_text(f"{self.step}\n")

    def follow(self) -> None:
        """Repeat the leader's schedule on the same blocks, waiting where it is ahead."""
        begun, saved = time.monotonic() - self.elapsed, self.elapsed
        while True:
            rows = self._schedule()
            if self.step >= len(rows):
                if (self.folder / "finished").exists() and len(self._schedule()) == self.step:
                    break
                time.sleep(5)
                continue
            for row in rows[self.step :]:
                step = Step(**json.loads(row))
                loss = self.run(step)
                self.elapsed = time.monotonic() - begun
                if step.number % 10 == 0:
                    self.log(step=step.number, elapsed=self.elapsed, loss=loss)
                if self.elapsed - saved > SAVE_SECONDS:
                    self.checkpoint()
                    saved = self.elapsed
                if self.stopped:
                    return self.save()
        self.checkpoint()

    def _schedule(self) -> list[str]:
        path = self.folder / "schedule.jsonl"
        text = path.read_text() if path.exists() else ""
        return text[: text.rfind("\n") + 1].splitlines()
