"""`make env`: the secrets of a compose stack."""

import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "compose" / "make-env.sh"


def _make(target: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", str(SCRIPT), str(target)], capture_output=True, text=True, timeout=30, check=False)


def _secrets(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def test_every_secret_is_new_and_long_and_readable_by_the_owner_alone(tmp_path: Path) -> None:
    one, other = tmp_path / "one.env", tmp_path / "other.env"
    assert _make(one).returncode == 0
    assert _make(other).returncode == 0
    assert one.stat().st_mode & 0o777 == 0o600
    secrets = _secrets(one)
    passwords = {"REDIS_PASSWORD", "POSTGRES_PASSWORD", "GRAFANA_PASSWORD"}
    assert secrets.keys() == {"HEADWATER_TOKEN"} | passwords
    assert len({*secrets.values(), *_secrets(other).values()}) == 8
    # They stand in URLs: no character may mean something there.
    assert all(len(value) == 64 and value.isalnum() for value in secrets.values())


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    target = tmp_path / ".env"
    target.write_text("HEADWATER_TOKEN=mine\n")
    answer = _make(target)
    assert answer.returncode == 1
    assert "is there already" in answer.stderr
    assert target.read_text() == "HEADWATER_TOKEN=mine\n"
