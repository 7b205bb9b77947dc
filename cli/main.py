"""The `headwater` console script: finds the commands, parses the line, and turns failures into exit codes.

A command is a module of this package whose docstring begins with its name and its help text, as in report.py:

    \"\"\"`headwater report`: Write plots (PNG) and a Markdown page into the run's report/ folder.

Its function of the same name (`report`) takes typer parameters and returns the exit code. The module is imported when
its command is called, so `--help` and a mistyped command answer at once.
"""

import importlib
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from shared.errors import HeadwaterError, SettingsError
from shared.secret_urls import without_secrets

FAILED, WRONG_USAGE = 1, 2
_FIRST_LINE = re.compile(r'"""`headwater ([a-z-]+)`: (.+?)(""")?$', re.MULTILINE)
_OVERRIDE = re.compile(r"--\w[\w-]*(\.[\w-]+)+(=.*)?", re.DOTALL)
_HELP_OPTIONS = {"help_option_names": ["--help", "-h"]}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 failed, 2 wrong usage or settings, 128 + n stopped by signal n."""
    try:
        return build_app()(argv, prog_name="headwater", standalone_mode=False) or 0
    except typer.TyperException as exc:
        context = getattr(exc, "ctx", None)
        return _complain(exc.format_message(), *([context.get_usage()] if context else []), code=WRONG_USAGE)
    except SettingsError as exc:
        return _complain(str(exc), code=WRONG_USAGE)
    except (HeadwaterError, OSError) as exc:
        return _complain(str(exc), code=FAILED)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def build_app() -> typer.Typer:
    app = typer.Typer(cls=_Commands, rich_markup_mode=None, context_settings=_HELP_OPTIONS)
    app.callback(help="Self-improving pretraining as a service stack.")(_options)
    for name, text in commands():
        app.command(name, help=text, short_help=text)(lambda: None)  # _Commands loads what is called
    return app


def commands() -> Iterator[tuple[str, str]]:
    """Names and help texts."""
    for path in sorted(Path(__file__).parent.glob("*.py")):
        with path.open(encoding="utf-8") as file:
            if found := _FIRST_LINE.match(file.readline()):
                yield found[1], found[2]


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of `--section.key VALUE` and `--section.key=VALUE`, and all other words."""
    overrides: list[str] = []
    others: list[str] = []
    left = iter(words)
    for word in left:
        if not _OVERRIDE.fullmatch(word):
            others.append(word)
        elif "=" in word:
            overrides.append(word)
        else:
            overrides += [word, *islice(left, 1)]
    return overrides, others


class _Commands(TyperGroup):
    """Takes the overrides out of the line, wherever they are, and imports the command that is called."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.obj, others = split_overrides(args)
        return super().parse_args(ctx, others)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, found, rest = super().resolve_command(ctx, args)
        if name is None or found is None:
            return name, found, rest
        command = _load(name, found.help or "")
        if ctx.obj and all(parameter.name != "overrides" for parameter in command.params):
            ctx.fail(f"{name} takes no settings: remove {ctx.obj[0]}.")
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        try:
            code = super().invoke(ctx)
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit must not fail again
            return 128 + signal.SIGPIPE


def _load(name: str, text: str) -> Any:
    stem = name.replace("-", "_")
    app = typer.Typer(rich_markup_mode=None, add_completion=False, context_settings=_HELP_OPTIONS)
    app.command(name, help=text)(getattr(importlib.import_module(f"cli.{stem}"), stem))
    return typer.main.get_command(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version  # 30 ms that only this option needs

        print(f"headwater {version('headwater')}")
        raise typer.Exit


_VERSION = typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)


def _options(show_version: Annotated[bool, _VERSION] = False) -> None:
    """Options of `headwater` itself; their callbacks do the work."""


def _complain(*lines: str, code: int) -> int:
    print(without_secrets("headwater: " + "\n".join(lines)), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
