"""Writes documents of the world as JSON lines: `python -m starter.documents --num N --out FILE.jsonl`."""

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from starter.world import World
from starter.writer import document_of


def documents(world: World, num: int, *, split: str = "train", first: int = 0) -> Iterator[dict[str, str]]:
    """Records with id and text. The policy's own documents ("base") and the held-out ones are other splits."""
    for index in range(first, first + num):
        yield {"id": f"{split}-{world.seed}-{index}", "text": document_of(world, split, index).text}


def write_documents(path: Path, records: Iterable[dict[str, str]]) -> None:
    """Whole or not at all: who reads `path` meanwhile goes on with the file that was there."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    temporary.replace(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m starter.documents", description=__doc__)
    parser.add_argument("--num", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", choices=["train", "heldout"], default="train")
    parser.add_argument("--seed", type=int, default=0, help="which world")
    options = parser.parse_args(arguments)
    write_documents(options.out, documents(World(options.seed), options.num, split=options.split))


if __name__ == "__main__":
    main()
