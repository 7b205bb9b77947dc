"""What a manifest can tell, and how much it takes."""

import json
import random

from shared.identity import Manifest


def test_changes_are_counted_and_the_first_few_named() -> None:
    before = Manifest({f"{index}.jsonl": index for index in range(9)})
    now = Manifest({f"{index}.jsonl": index + (index == 8) for index in range(5, 9)} | {"new.jsonl": 1})
    assert before.differences(now) == [
        "1 file was added (new.jsonl)",
        "5 files are gone (0.jsonl, 1.jsonl, 2.jsonl, ...)",
        "1 file has another size (8.jsonl: 8 bytes, now 9)",
    ]
    assert now.differences(now) == []


def test_a_hundred_thousand_files_take_a_megabyte_and_each_is_known() -> None:
    draw = random.Random(0)
    names = [f"crawl/{draw.randrange(100):02d}/part-{index:06d}.jsonl.zst" for index in range(100_000)]
    before = Manifest({name: draw.randrange(10**6, 10**9) for name in names})
    stored = before.stored()
    assert (stored["num_files"], stored["num_bytes"]) == (100_000, sum(before.files.values()))
    assert len(json.dumps(stored)) < 1_500_000
    without = Manifest({name: size for name, size in before.files.items() if name != names[777]})
    assert Manifest.load(stored).differences(without) == [f"1 file is gone ({names[777]})"]
    assert stored["digest"] != without.stored()["digest"]


def test_the_order_of_files_means_nothing() -> None:
    assert Manifest({"a": 1, "b": 2}).stored() == Manifest({"b": 2, "a": 1}).stored()
