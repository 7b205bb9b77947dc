"""Who gets in."""

import pytest

from shared.errors import AuthError, SettingsError
from shared.http import authorization_header, check_bearer, generate_token, refuse_open_binding
from shared.settings import Secrets


def test_the_right_token_gets_in() -> None:
    check_bearer(authorization_header("secret")["Authorization"], token="secret")


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", "Basic secret", "secret", "Bearer sécret"])
def test_anything_else_is_refused(header: str | None) -> None:
    with pytest.raises(AuthError):
        check_bearer(header, token="secret")


def test_without_a_token_everybody_gets_in() -> None:
    check_bearer(None, token="")
    assert authorization_header("") == {}


def test_tokens_are_long_and_never_the_same() -> None:
    tokens = {generate_token() for _ in range(100)}
    assert len(tokens) == 100
    assert min(map(len, tokens)) >= 40


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_an_open_binding_needs_a_token(host: str) -> None:
    with pytest.raises(SettingsError, match=f"binding to {host} without a token .* set HEADWATER_TOKEN"):
        refuse_open_binding(host, Secrets())
    refuse_open_binding(host, Secrets(token="a"))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.9.9.9"])
def test_loopback_needs_none(host: str) -> None:
    refuse_open_binding(host, Secrets())
