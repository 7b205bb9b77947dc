"""The demo, whole but shorter: real services, the shipped models, and the checker's opinion afterwards."""

import json
from pathlib import Path

import pytest

from cli.demo import Size, demo, world_of
from shared.errors import HeadwaterError


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_short_demo_makes_the_policy_safer_and_cleaner_and_says_so(tmp_path: Path) -> None:
    size = Size(steps=24, num_prefixes=400, num_documents=1000)

    assert demo(size, directory=tmp_path / "demo", seed=0) == 0

    report = tmp_path / "demo" / "report"
    measured = json.loads((report / "measured.json").read_text(encoding="utf-8"))
    base, trained = measured["base"], measured["online DPO"]
    assert trained["safe"]["mean"] >= base["safe"]["mean"] + 0.25
    assert trained["all_clean"]["mean"] >= base["all_clean"]["mean"] + 0.15
    assert trained["win_rate"]["mean"] > 0.6
    next_token = measured["next token"]["all_clean"]
    assert next_token["low"] <= base["all_clean"]["high"]  # more of the same documents: within the noise of the base
    assert {"measures.png", "chosen.png", "report.md"} <= {file.name for file in report.iterdir()}


def test_models_that_name_no_world_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HeadwaterError, match=r"measured\.json does not name a world .* starter\.recipe"):
        world_of(tmp_path)
