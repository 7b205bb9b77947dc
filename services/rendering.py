"""The one form of an error answer: `{"error": {"type": ..., "message": ...}}`. For services/app.py and middleware."""

from collections.abc import Mapping

from fastapi.responses import JSONResponse

from shared.errors import AuthError, HeadwaterError

RETRY_AFTER_S = 1
"""A batch takes about a second; callers back off further by themselves."""


def error_response(kind: str, message: str, *, status: int, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse(
        {"error": {"type": kind, "message": message}}, status_code=status, headers=dict(headers) if headers else None
    )


def render_error(exc: HeadwaterError) -> JSONResponse:
    """Its class name as type, its text as message, its own status."""
    return error_response(type(exc).__name__, str(exc), status=exc.status, headers=_headers(exc))


def _headers(exc: HeadwaterError) -> dict[str, str]:
    if exc.status == 503:
        return {"Retry-After": str(RETRY_AFTER_S)}
    if isinstance(exc, AuthError):
        return {"WWW-Authenticate": "Bearer"}
    return {}
