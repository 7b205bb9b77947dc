"""The quick demo, whole: real services, the shipped models, and the checker's opinion afterwards."""

import json
from pathlib import Path

import pytest

from cli.demo import demo


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_quick_demo_makes_the_policy_safer_and_says_so(tmp_path: Path) -> None:
    assert demo(quick=True, directory=tmp_path / "demo") == 0

    report = tmp_path / "demo" / "report"
    measured = json.loads((report / "measured.json").read_text(encoding="utf-8"))
    assert measured["online DPO"]["safe"]["mean"] >= measured["base"]["safe"]["mean"] + 0.08
    assert measured["online DPO"]["win_rate"]["mean"] > 0.55
    assert {"measures.png", "chosen.png", "report.md"} <= {file.name for file in report.iterdir()}
