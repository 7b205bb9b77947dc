"""Secrets are made on the operator's machine, differ every time, and never get into the repository."""

import base64
import shutil
import stat
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import sqlalchemy as sa

from shared.configuration import load_secrets
from tests.k8s.rendering import K8S, ROOT, of_kind, render

FOLDER = K8S / "secrets"


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """k8s/secrets as `make k8s-secrets` leaves it."""
    folder = tmp_path / "secrets"
    folder.mkdir()
    for name in ("make.sh", "kustomization.yaml"):
        shutil.copy(FOLDER / name, folder)
    make(folder)
    return folder


def make(folder: Path) -> str:
    command = ["sh", str(folder / "make.sh")]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True, cwd=folder.parent).stdout


def values(file: Path) -> dict[str, str]:
    pairs = (line.partition("=") for line in file.read_text(encoding="utf-8").splitlines())
    return {name: value for name, _, value in pairs}


def test_tokens_and_passwords_are_random_and_only_the_owner_reads_them(made: Path) -> None:
    tokens = load_secrets(values(made / "tokens.env"))
    passwords = [values(made / "redis.env")["REDISCLI_AUTH"], values(made / "postgres.env")["POSTGRES_PASSWORD"]]
    secrets = {tokens.token, *passwords}
    assert len(secrets) == 3
    assert all(len(secret) >= 40 for secret in secrets)
    for file in made.glob("*.env"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file.name


def test_the_stores_are_reached_with_the_passwords_that_they_were_given(made: Path) -> None:
    stores = values(made / "stores.env")
    redis = urlsplit(stores["HEADWATER_REDIS__URL"])
    assert (redis.scheme, redis.hostname, redis.port) == ("redis", "redis", 6379)
    assert redis.password == values(made / "redis.env")["REDISCLI_AUTH"]
    database = sa.make_url(stores["HEADWATER_DATABASE__URL"])
    assert (database.host, database.port, database.database) == ("postgres", 5432, "headwater")
    assert database.username == "headwater"
    assert database.password == values(made / "postgres.env")["POSTGRES_PASSWORD"]


def test_making_them_again_keeps_them(made: Path) -> None:
    before = {file.name: file.read_text(encoding="utf-8") for file in made.glob("*.env")}
    assert make(made).count("is there already and stays") == len(before) == 6
    assert {file.name: file.read_text(encoding="utf-8") for file in made.glob("*.env")} == before


def test_they_become_secrets_of_the_names_that_pods_use(made: Path) -> None:
    secrets = {one["metadata"]["name"]: one.get("data", {}) for one in of_kind(render(made), "Secret")}
    token = values(made / "tokens.env")["HEADWATER_TOKEN"]
    assert base64.b64decode(secrets["tokens"]["HEADWATER_TOKEN"]).decode() == token
    assert secrets.keys() == {"tokens", "stores", "redis", "postgres", "models", "endpoint"}


def test_git_ignores_them() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = ["tokens.env", "stores.env", "redis.env", "postgres.env", "models.env", "endpoint.env", "a.env.tmp"]
    paths = [f"k8s/secrets/{name}" for name in names]
    answer = subprocess.run(["git", "check-ignore", *paths], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert answer.stdout.split() == paths
