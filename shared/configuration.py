"""Loads `Settings` and writes them down.

    settings = load_settings(Path("run.toml"), ["--trainer.steps", "10"])   # file < environment < command line
    write_settings(without_passwords(settings), settings.run.folder / "settings.toml")

Errors name the file, variable or option that the wrong value came from.
"""

import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ValidationError

from shared.engine_settings import Section
from shared.errors import SettingsError
from shared.secret_urls import without_secrets
from shared.settings import Secrets, Settings

_SectionT = TypeVar("_SectionT", bound=Section)
_PREFIX = "HEADWATER_"
_SECRETS = {f"{_PREFIX}{name.upper()}": name for name in Secrets.model_fields}


def load_settings(
    path: Path | None, overrides: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> Settings:
    """Settings from `path` (TOML), then `HEADWATER_SECTION__KEY`, then `--section.key value` pairs.

    Raises SettingsError with one line per wrong key: where it was given, what is wrong.
    """
    data: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if path is not None:
        data = read_toml(path)
        origins = dict.fromkeys(data, str(path))
    given = _environment_values(os.environ if environ is None else environ)
    for keys, value, origin in [*given, *_command_line_values(overrides)]:
        _set(data, keys, value, origins, origin=origin)
    try:
        return Settings.model_validate(data)
    except ValidationError as exc:
        raise SettingsError(_explain(exc, origins)) from exc


def load_secrets(environ: Mapping[str, str] | None = None) -> Secrets:
    found = os.environ if environ is None else environ
    return Secrets(**{name: found[variable] for variable, name in _SECRETS.items() if variable in found})


def write_settings(settings: Settings, path: Path) -> None:
    """As TOML, whole or not at all."""
    data = settings.model_dump(mode="json", exclude_none=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(tomli_w.dumps(data), encoding="utf-8")
    temporary.replace(path)


def without_passwords(settings: Settings) -> Settings:
    """For everything that is stored: without the secrets in URLs."""
    return _cleaned(settings)


def secret_variables(settings: Settings) -> dict[str, str]:
    """The settings that `without_passwords` changes, whole, as HEADWATER_* variables."""
    changed = ((place, text) for place, text in _texts(settings, ()) if without_secrets(text) != text)
    return {f"{_PREFIX}{'__'.join(place).upper()}": text for place, text in changed}


def _cleaned(section: _SectionT) -> _SectionT:
    changes: dict[str, Any] = {}
    for name, value in section:
        if isinstance(value, str):
            changes[name] = without_secrets(value)
        elif isinstance(value, Section):
            changes[name] = _cleaned(value)
    return section.model_copy(update=changes)


def _texts(section: Section, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    for name, value in section:
        if isinstance(value, str):
            yield (*place, name), value
        elif isinstance(value, Section):
            yield from _texts(value, (*place, name))


def read_toml(path: Path) -> dict[str, Any]:
    """Not yet validated. Raises SettingsError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise SettingsError(f"no configuration file at {path}") from exc
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise SettingsError(f"{path} is not readable TOML: {exc}") from exc


def _environment_values(environ: Mapping[str, str]) -> list[tuple[list[str], Any, str]]:
    return [
        (name.removeprefix(_PREFIX).lower().split("__"), _parse(value), f"environment variable {name}")
        for name, value in sorted(environ.items())
        if name.startswith(_PREFIX) and name not in _SECRETS
    ]


def _command_line_values(overrides: Sequence[str]) -> list[tuple[list[str], Any, str]]:
    values: list[tuple[list[str], Any, str]] = []
    words = list(overrides)
    while words:
        option = words.pop(0)
        if not option.startswith("--") or "." not in option:
            raise SettingsError(f"expected --section.key VALUE, got {option!r}")
        name, equals, value = option.removeprefix("--").partition("=")
        if not equals:
            if not words:
                raise SettingsError(f"{option} needs a value")
            value = words.pop(0)
        values.append((name.replace("-", "_").split("."), _parse(value), f"command line --{name}"))
    return values


def _parse(text: str) -> Any:
    """Lists and tables as JSON or TOML; other values stay text, which pydantic converts."""
    if not text.startswith(("[", "{")):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as exc:
        raise SettingsError(f"neither JSON nor TOML: {text!r} ({exc})") from exc


def _set(data: dict[str, Any], keys: list[str], value: Any, origins: dict[str, str], *, origin: str) -> None:
    _refuse_unknown(keys, origin)
    place = data
    for key in keys[:-1]:
        inner = place.setdefault(key, {})
        if not isinstance(inner, dict):
            raise SettingsError(f"{origin}: {key} is a value, not a section")
        place = inner
    place[keys[-1]] = value
    origins[".".join(keys)] = origin


def _refuse_unknown(keys: list[str], origin: str) -> None:
    """Here, where the origin is known: the validator would only see a section of that name."""
    model: type[BaseModel] | None = Settings
    for depth, key in enumerate(keys):
        if model is None:
            return
        if key not in model.model_fields:
            name, known = ".".join(keys[: depth + 1]), ", ".join(model.model_fields)
            raise SettingsError(f"{origin}: no setting {name!r}; known here: {known}")
        annotation = model.model_fields[key].annotation
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    if model is not None:
        raise SettingsError(f"{origin}: {'.'.join(keys)} is a section, name a key in it")


def _explain(exc: ValidationError, origins: Mapping[str, str]) -> str:
    lines = []
    for error in exc.errors():
        place = [str(piece) for piece in error["loc"]]
        names = (".".join(place[:length]) for length in range(len(place), 0, -1))
        origin = next((origins[name] for name in names if name in origins), "settings")
        message = "no such setting" if error["type"] == "extra_forbidden" else error["msg"]
        given = "" if error["type"] in {"extra_forbidden", "missing", "value_error"} else f", got {error['input']!r}"
        lines.append(f"{origin}: {'.'.join(place) or 'settings'}: {message}{given}")
    return "\n".join(lines)
