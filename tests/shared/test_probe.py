"""A container's health check, against a real server."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from shared.probe import main


class _Answers(BaseHTTPRequestHandler):
    """Path /503 answers 503, and so on; /token answers 200 to who has the token."""

    def do_GET(self) -> None:
        has_token = self.headers.get("Authorization") == "Bearer word"
        self.send_response(int(self.path[1:]) if self.path != "/token" else 200 if has_token else 401)
        self.end_headers()
        self.wfile.write(b'{"detail": "the engine is starting"}\n')

    def log_message(self, format: str, *args: object) -> None:
        """Not into the test's output."""


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join(10)


def test_a_success_is_status_0_and_its_body(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"{url}/200"]) == 0
    assert capsys.readouterr().out == '{"detail": "the engine is starting"}\n'


def test_a_refusal_is_status_1_and_says_why(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"{url}/503"]) == 1
    assert capsys.readouterr().err == f'{url}/503 answers 503: {{"detail": "the engine is starting"}}\n'


def test_the_token_is_sent_where_there_is_one(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main([f"{url}/token"]) == 1
    monkeypatch.setenv("HEADWATER_TOKEN", "word")
    assert main([f"{url}/token"]) == 0


def test_silence_is_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["http://127.0.0.1:1/readyz"]) == 1
    assert "can't be reached" in capsys.readouterr().err


def test_no_proxy_is_asked_for_this_machine(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "")
    assert main([f"{url}/200"]) == 0


def test_it_takes_one_url(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("usage:")
