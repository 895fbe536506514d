"""Train the demo checkpoint, step by step:

    python tools/train_demo.py corpus --work W --lib .../lib/python3.11 --docs .../html/_sources
    python tools/train_demo.py train  --work W --minutes 95          # resumes where it stopped
    python tools/train_demo.py twin   --work W                       # beside it: the float twin
    python tools/train_demo.py export --work W --out bitnet_ext/demo
    PYTHONPATH=. python tools/update_readme.py           # README.md shows the demo's text

Needs torch and tokenizers (`pip install bitnet-ext[train] tokenizers`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from demo_recipe.bpe import save_tokenizer, train_tokenizer
from demo_recipe.corpus import Corpus


def build_corpus(args: argparse.Namespace) -> None:
    corpus = Corpus(args.lib, args.docs)
    corpus.save(args.work / "corpus")
    print(json.dumps(corpus.summary()["train"]), dict(corpus.dropped))
    texts = [t for t in corpus.train if t.source != "test"]
    texts += [t for t in corpus.train if t.source == "lib"]  # code counts twice
    save_tokenizer(train_tokenizer(t.text for t in texts), args.work, 1024)


def train(args: argparse.Namespace) -> None:
    import torch
    from demo_recipe.training import Trainer

    torch.set_num_threads(args.threads)
    trainer = Trainer(args.work, ternary=args.command == "train")
    if args.command == "train":
        trainer.lead(args.minutes)
    else:
        trainer.follow()


def export(args: argparse.Namespace) -> None:
    from demo_recipe.export import export_checkpoint

    export_checkpoint(args.work, args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("corpus", "train", "twin", "export"):
        command = commands.add_parser(name)
        command.add_argument("--work", type=Path, required=True)
        if name == "corpus":
            command.add_argument("--lib", type=Path, required=True)
            command.add_argument("--docs", type=Path)
        elif name == "export":
            command.add_argument("--out", type=Path, required=True)
        else:
            command.add_argument("--minutes", type=float, default=95.0)
            command.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    run = {"corpus": build_corpus, "export": export}.get(args.command, train)
    run(args)


if __name__ == "__main__":
    main()
