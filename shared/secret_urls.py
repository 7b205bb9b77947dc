"""Takes the secrets out of URLs: the one way in which addresses reach a file, a table, a log, an error or a route.

    postgresql://me:SECRET@db/runs?sslmode=require&sslpassword=SECRET  ->  postgresql://me@db/runs?sslmode=require
    http://KEY@host/v1?api_key=SECRET#SECRET                           ->  http://host/v1

What is known to be harmless stays, everything else goes: passwords, user names that may be keys, options, fragments. Of
a URL that can't be taken apart with certainty only the scheme stays; settings refuse such a one (`url_of`), since the
libraries that fail on it repeat pieces of it. A path is part of the address and stays: it is no place for a key.
"""

import re

from pydantic import AfterValidator

_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*"
_LEGAL = r"[A-Za-z0-9._~%!$&()*+,;=:/?\[\]{}|^-]"
"""What may stand in a URL, but for # and @. Everything else is written as %XX, so that its end is seen in any text."""
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
"""At the end of a URL in a sentence it is the sentence's."""

_NAMED_USERS = frozenset({"postgresql", "postgres", "abfs", "abfss"})
"""Where the user is a name (of a role, of a container) and needed to find the place; elsewhere it may be a key."""
_HARMLESS_OPTIONS = frozenset(
    {
        *("host", "port", "db", "dbname", "protocol", "charset", "client_encoding", "region", "api-version"),
        *("application_name", "target_session_attrs", "sslmode", "sslrootcert", "ssl_cert_reqs", "ssl_ca_certs"),
        *("timeout", "connect_timeout", "socket_timeout", "socket_connect_timeout", "mode", "cache", "uri"),
    }
)
_REMEDY = "write the special characters of a password as %XX (@ is %40, / is %2F, # is %23, ? is %3F, a blank is %20)"


def without_secrets(text: str) -> str:
    """`text`, which may be a URL or have some in it, with nothing secret left in them."""
    return _IN_TEXT.sub(lambda found: _cleaned(found[0]), text) if "://" in text else text


def url_of(*schemes: str) -> AfterValidator:
    """For settings that hold URLs: ValueError, which repeats nothing of it, for one that can't be taken apart.

    With `schemes` only these will do; without, whatever is no URL is a path and passes.
    """

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
    """None for what can be read in two ways, with a password that ends elsewhere in each."""
    found = _URL.fullmatch(url)
    if found is None:
        return None
    has_user = found["user"] is not None
    may_hide_password = has_user or ":" in (found["hosts"] or "")
    if may_hide_password and "@" in (found["path"] or ""):
        return None
    has_more = has_user or found["query"] is not None or found["fragment"] is not None
    return found if not has_more or re.fullmatch(rf"(?:{_LEGAL}|[@#])*", url) else None


def _is_harmless(option: str) -> bool:
    name, _, value = option.partition("=")
    return name in _HARMLESS_OPTIONS and "://" not in value
