"""Removes secrets from URLs before they reach a file, a table, a log, an error or an answer.

    postgresql://me:SECRET@db/runs?sslmode=require&sslpassword=SECRET  ->  postgresql://me@db/runs?sslmode=require
    http://KEY@host/v1?api_key=SECRET#SECRET                           ->  http://host/v1

Only what is known to be harmless stays, and the path: don't put keys into it. If a URL can be parsed in two ways, only
its scheme stays; settings refuse it (`url_of`), since libraries that fail on it print pieces of it.
"""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import AfterValidator

_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*"
_LEGAL = r"[A-Za-z0-9._~%!$&()*+,;=:/?\[\]{}|^-]"
"""Characters of a URL except # and @. All others must be written as %XX, which also shows where a URL in text ends."""
_HOST = r"(?:[A-Za-z0-9._~%*-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
_URL = re.compile(
    rf"(?P<scheme>{_SCHEME})://"
    rf"(?:(?P<user>[^@/?#:]*)(?P<password>:[^@/?#]*)?@)?"
    rf"(?P<hosts>{_HOST}(?:,{_HOST})*)?"
    rf"(?P<path>/[^?#]*)?"
    rf"(?:\?(?P<query>{_LEGAL}*))?"
    rf"(?:\#(?P<fragment>{_LEGAL}*))?"
)
_BORDER = rf"(?:,\s*|::)(?={_SCHEME}://)"
"""Between the URLs of several replicas, or of chained file systems."""
_IN_TEXT = re.compile(rf"{_SCHEME}://(?:(?!{_BORDER})[^\s\"'<>`\\])*")
_PUNCTUATION = ".,:;!?)]}"
"""At the end of a URL it belongs to the sentence around it."""

_NAMED_USERS = frozenset({"postgresql", "postgres", "abfs", "abfss"})
"""Schemes whose user is the name of a role or container, and part of the address; in others it may be a key."""
_HARMLESS_OPTIONS = frozenset(
    {
        *("host", "port", "db", "dbname", "protocol", "charset", "client_encoding", "region", "api-version"),
        *("application_name", "target_session_attrs", "sslmode", "sslrootcert", "ssl_cert_reqs", "ssl_ca_certs"),
        *("timeout", "connect_timeout", "socket_timeout", "socket_connect_timeout", "mode", "cache", "uri"),
    }
)
_REMEDY = "write the special characters of a password as %XX (@ is %40, / is %2F, # is %23, ? is %3F, a blank is %20)"


def without_secrets(text: str) -> str:
    """`text` with the secrets removed from all URLs in it."""
    return _IN_TEXT.sub(lambda found: _cleaned(found[0]), text) if "://" in text else text


def url_of(*schemes: str) -> "AfterValidator":
    """Validates a setting that holds a URL. The ValueError repeats nothing of it.

    With `schemes` the URL must have one of them; without, text that is no URL is a path and valid.
    """
    from pydantic import AfterValidator  # not for every error and log line

    def check(value: str) -> str:
        urls = re.split(_BORDER, value) if value else []
        if schemes and any(url.partition("://")[0].lower() not in schemes or "://" not in url for url in urls):
            raise ValueError(f"it must begin with {' or '.join(f'{scheme}://' for scheme in schemes)}")
        if any("://" in url and _parsed(url) is None for url in urls):
            raise ValueError(f"it is no URL that can be read with certainty: {_REMEDY}")
        return value

    return AfterValidator(check)


def _cleaned(url: str) -> str:
    end = url.rstrip(_PUNCTUATION)
    found = _parsed(end)
    if found is None:
        return f"{url.partition('://')[0]}://"
    scheme, user = found["scheme"], found["user"]
    name = f"{user}@" if user and scheme.lower().partition("+")[0] in _NAMED_USERS else ""
    options = "&".join(option for option in re.split("[&;]", found["query"] or "") if _is_harmless(option))
    query = f"?{options}" if options else ""
    return f"{scheme}://{name}{found['hosts'] or ''}{found['path'] or ''}{query}{url[len(end) :]}"


def _parsed(url: str) -> re.Match[str] | None:
    """None if it can be parsed in two ways, with a different end of the password."""
    found = _URL.fullmatch(url)
    if found is None:
        return None
    has_user = found["user"] is not None
    if (has_user or ":" in (found["hosts"] or "")) and "@" in (found["path"] or ""):
        return None
    has_more = has_user or found["query"] is not None or found["fragment"] is not None
    return found if not has_more or re.fullmatch(rf"(?:{_LEGAL}|[@#])*", url) else None


def _is_harmless(option: str) -> bool:
    name, _, value = option.partition("=")
    return name in _HARMLESS_OPTIONS and "://" not in value
