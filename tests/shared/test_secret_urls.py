"""Secrets in any part of a URL, wherever it stands."""

import itertools
import json
from typing import Annotated

import pytest
from pydantic import TypeAdapter, ValidationError

from shared.secret_urls import url_of, without_secrets

MARK = "hUsh"
ANY = TypeAdapter(Annotated[str, url_of()])


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("redis://:word@redis:6379/0", "redis://redis:6379/0"),
        ("redis://redis:6379/0", "redis://redis:6379/0"),
        ("redis://redis:6379/0?password=word&db=2", "redis://redis:6379/0?db=2"),
        ("rediss://key@redis/0#word", "rediss://redis/0"),
        ("unix://:word@/run/redis.sock?db=1", "unix:///run/redis.sock?db=1"),
        ("postgresql://me@db/runs", "postgresql://me@db/runs"),
        ("postgresql+psycopg://me:w:o@db:5432/runs", "postgresql+psycopg://me@db:5432/runs"),
        (
            "postgresql://me:word@a:1,b:2/runs?sslmode=verify-full&sslpassword=word&target_session_attrs=any",
            "postgresql://me@a:1,b:2/runs?sslmode=verify-full&target_session_attrs=any",
        ),
        ("postgresql://me:word@/runs?host=/run/pg", "postgresql://me@/runs?host=/run/pg"),
        ("postgresql://me:word@[::1]:5432/runs", "postgresql://me@[::1]:5432/runs"),
        ("sqlite:////tmp/a@b.db", "sqlite:////tmp/a@b.db"),
        ("sqlite:////tmp/my runs/a.db", "sqlite:////tmp/my runs/a.db"),
        ("s3://id:word@bucket/run?token=word", "s3://bucket/run"),
        ("abfs://box@account.dfs.core.windows.net/run", "abfs://box@account.dfs.core.windows.net/run"),
        ("https://key@host/v1?api-version=2024-02-01&api_key=word", "https://host/v1?api-version=2024-02-01"),
        ("http://a:word@h1:1,http://b:word@h2:2/x", "http://h1:1,http://h2:2/x"),
        ("simplecache::s3://id:word@bucket/run", "simplecache::s3://bucket/run"),
        ("runs/a:b@c", "runs/a:b@c"),
        ("", ""),
    ],
)
def test_what_is_harmless_is_kept(url: str, kept: str) -> None:
    assert ANY.validate_python(url) == url
    assert without_secrets(url) == kept


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://me:w/{MARK}@db/runs",
        f"postgresql://me:w@{MARK}@db/runs",
        f"postgresql://me:w?{MARK}@db/runs",
        f"postgresql://me:w#{MARK}@db/runs",
        f"postgresql://me:w@{MARK}#@db/runs",
        f"redis://:1/{MARK}@redis/0",
        f"redis://:{MARK}",
        f"redis://me:{MARK}",
        f"redis://:w {MARK}@redis/0",
        f"redis://:w'{MARK}@redis/0",
        f"redis://:w\\{MARK}@redis/0",
        f"redis://:wé{MARK}@redis/0",
        f"http://host:80/v1?token=a@{MARK}",
        f"http://host:port/{MARK}@x",
        f"sqlite:////tmp/my runs/a.db?key={MARK}",
    ],
)
def test_what_can_be_read_in_two_ways_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ValidationError, match="@ is %40") as caught:
        ANY.validate_python(url)
    assert MARK not in caught.value.errors()[0]["msg"]
    if not set(" '\\é") & set(url):
        assert MARK not in without_secrets(f"{url}: no answer")


def test_a_scheme_that_will_not_do_is_refused() -> None:
    redis = TypeAdapter(Annotated[str, url_of("redis", "rediss")])
    assert redis.validate_python("") == ""
    for url in (f"me:{MARK}@redis:6379", f"http://:{MARK}@redis"):
        with pytest.raises(ValidationError, match="must begin with redis:// or rediss://"):
            redis.validate_python(url)


USERS = ["", f"{MARK}@", f"me:{MARK}@", f":{MARK}@", f"me:%40{MARK}:%2F@", f"{MARK}:@"]
HOSTS = ["host", "host:6379", "h1:1,h2:2", "[::1]:80"]
PATHS = ["", "/", "/v1/x", "/a b/c"]
OPTIONS = ["", f"?{MARK}", *(f"?{key}={MARK}" for key in ("password", "sslpassword", "token", "api_key", "sig", "x"))]
MORE = ["", f"&secret={MARK}", f";access_key={MARK}", f"&redirect=http://{MARK}", f"&%70assword={MARK}"]
FRAGMENTS = ["", f"#{MARK}", f"#a=b&key={MARK}"]
PLACES = ["{}", "judge at {}: no answer", "[Errno 2] '{}'", '{{"url": "{}"}}', "({}).", "{},{}", "a@b {} c@d", "{}\n{}"]


@pytest.mark.parametrize("scheme", ["redis", "postgresql+psycopg", "https", "s3"])
def test_no_secret_is_left_wherever_it_stands_in_a_url_and_the_url_in_a_text(scheme: str) -> None:
    for user, host, path, option, more, fragment in itertools.product(USERS, HOSTS, PATHS, OPTIONS, MORE, FRAGMENTS):
        if scheme == "postgresql+psycopg" and user.startswith(f"{MARK}"):
            continue  # the name of a role is none
        options = option + more if option else more.replace("&", "?", 1) if more.startswith("&") else ""
        url = f"{scheme}://{user}{host}{path}{options}{fragment}"
        try:
            ANY.validate_python(url)
        except ValidationError:
            assert " " in path
            assert user or options or fragment
            continue
        for place in PLACES:
            text = place.format(url, url)
            assert MARK not in without_secrets(text), text
            assert MARK not in without_secrets(json.dumps({"message": text})), text


def test_text_without_urls_is_left_alone() -> None:
    text = "a key: value, me@example.org, 3://4, C:\\x and 12:30"
    assert without_secrets(text) == text
