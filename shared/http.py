"""The bearer token of every route but health: made by the local launcher or an operator, compared in constant time."""

import hmac
import ipaddress
import secrets

from shared.errors import AuthError, SettingsError
from shared.settings import Secrets


def generate_token() -> str:
    """32 random bytes, URL-safe."""
    return secrets.token_urlsafe(32)


def authorization_header(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


def check_bearer(header: str | None, *, token: str) -> None:
    """Raise AuthError unless `header` is `Bearer <token>`. An empty `token` accepts everybody."""
    if not token:
        return
    scheme, _, given = (header or "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), token.encode()):
        raise AuthError("missing or wrong bearer token: send 'Authorization: Bearer <HEADWATER_TOKEN>'")


def refuse_open_binding(host: str, secrets_: Secrets) -> None:
    """Raise SettingsError if a service would listen beyond loopback without a token."""
    if not (_is_loopback(host) or secrets_.token):
        raise SettingsError(f"binding to {host} without a token would let anybody in: set HEADWATER_TOKEN")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
