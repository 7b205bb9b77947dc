"""Who gets in, and what a process without requests of work serves."""

import socket

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from shared import metrics
from shared.errors import AuthError, SettingsError
from shared.http import authorization_header, check_bearer, generate_token, refuse_open_binding, serving_metrics
from shared.settings import Secrets
from tests.services.collector.processes import free_port


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


TOKEN = Secrets(token="t0ken")


def get(port: int | None, path: str, token: str = "") -> httpx.Response:
    headers = authorization_header(token) | {"Accept": "application/openmetrics-text; version=1.0.0"}
    return httpx.get(f"http://127.0.0.1:{port}{path}", headers=headers, timeout=5, trust_env=False)


def test_metrics_of_one_role_are_served_as_text_to_who_has_the_token() -> None:
    metrics.step.set(17)
    with serving_metrics("trainer", "127.0.0.1", free_port(), TOKEN) as port:
        answer = get(port, "/metrics", "t0ken")
        assert answer.headers["content-type"].startswith("text/plain; version=")
        assert answer.headers["content-encoding"] == "gzip"
        families = {family.name: family for family in text_string_to_metric_families(answer.text)}
        assert families["headwater_step"].samples[0].value == 17
        assert "headwater_leased_parts" not in families


def test_others_are_refused_and_health_is_open() -> None:
    with serving_metrics("trainer", "127.0.0.1", free_port(), TOKEN) as port:
        assert [get(port, "/metrics", token).status_code for token in ("", "guess")] == [401, 401]
        assert get(port, "/healthz").json() == {"status": "ok"}
        answer = get(port, "/weights", "t0ken")
        assert (answer.status_code, answer.json()["error"]["type"]) == (404, "NotFound")


def test_a_port_of_0_serves_nothing() -> None:
    with serving_metrics("trainer", "127.0.0.1", 0, TOKEN) as port:
        assert port is None


def test_the_port_is_free_again_afterwards() -> None:
    wanted = free_port()
    for _ in range(2):
        with serving_metrics("trainer", "127.0.0.1", wanted, TOKEN) as port:
            assert port == wanted
            assert get(port, "/healthz").is_success


def test_a_taken_port_and_an_open_binding_are_settings_errors() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with (
            pytest.raises(SettingsError, match=f"trainer.metrics_port: can't listen on 127.0.0.1:{port}: .*choose"),
            serving_metrics("trainer", "127.0.0.1", port, TOKEN),
        ):
            raise AssertionError("served on a taken port")
    with pytest.raises(SettingsError, match="HEADWATER_TOKEN"), serving_metrics("trainer", "0.0.0.0", 1, Secrets()):
        raise AssertionError("served openly")
