"""`python -m shared.probe URL`: a container's health check. Prints a 2xx answer, else fails with the reason.

Standard library only: every container runs it every few seconds, and images have no curl. It sends HEADWATER_TOKEN, if
that is set, so that it can ask for /status too.
"""

import os
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence

TIMEOUT_S = 4.0
_MAX_BYTES = 64_000


class ProbeFailed(Exception):
    """With the words of the other side if it answered."""


def probe(url: str, *, timeout_s: float = TIMEOUT_S) -> str:
    """The body of a 2xx answer. Raises ProbeFailed."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would be asked for this machine
    try:
        with direct.open(urllib.request.Request(url, headers=_headers()), timeout=timeout_s) as answer:
            return _text(answer.read(_MAX_BYTES))
    except urllib.error.HTTPError as exc:
        raise ProbeFailed(f"{url} answers {exc.code}: {_text(exc.read(_MAX_BYTES))}") from exc
    except (OSError, ValueError) as exc:
        raise ProbeFailed(f"{url} can't be reached: {exc}") from exc


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    if len(given) != 1:
        sys.stderr.write("usage: python -m shared.probe URL\n")
        return 2
    try:
        sys.stdout.write(f"{probe(given[0])}\n")
    except ProbeFailed as exc:
        sys.stderr.write(f"{exc}\n")
        return 1
    return 0


def _headers() -> dict[str, str]:
    token = os.environ.get("HEADWATER_TOKEN", "")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _text(content: bytes) -> str:
    return content.decode("utf-8", errors="replace").strip()


if __name__ == "__main__":
    sys.exit(main())
