"""The console script `headwater`: parses the command line and hands over to the subcommand's module.

Nothing heavy is imported here, so that `--help` and a mistyped option answer at once.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from shared.errors import HeadwaterError, SettingsError

Handler = Callable[[argparse.Namespace, list[str]], int]
_SETTINGS_HINT = "Any setting may be overridden: --section.key VALUE, such as --trainer.steps 200."


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 failed, 2 wrong settings or usage, 130/143 stopped by a signal."""
    parser = build_parser()
    options, rest = parser.parse_known_args(argv)
    if rest and not options.takes_settings:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    handler: Handler = options.handler
    try:
        return handler(options, rest)
    except SettingsError as exc:
        print(f"headwater: {exc}", file=sys.stderr)
        return 2
    except HeadwaterError as exc:
        print(f"headwater: {exc}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headwater", description="Self-improving pretraining as a service stack.", allow_abbrev=False
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_run(commands)
    _add_check(commands)
    _add_prepare(commands)
    _add_init_model(commands)
    _add_audit(commands)
    _add_report(commands)
    _add_demo(commands)
    _add_sweep(commands)
    _add_swap_judge(commands)
    return parser


_Commands = argparse._SubParsersAction  # argparse has no public name for what add_subparsers returns


def _add(
    commands: "_Commands[argparse.ArgumentParser]", name: str, text: str, handler: Handler, *, takes_settings: bool
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=_SETTINGS_HINT if takes_settings else None,
        allow_abbrev=False,
    )
    parser.set_defaults(handler=handler, takes_settings=takes_settings)
    return parser


def _add_run(commands: "_Commands[argparse.ArgumentParser]") -> None:
    text = "Start Redis, services, collector and trainer on this machine and run to trainer.steps, or resume."
    parser = _add(commands, "run", text, _run, takes_settings=True)
    parser.add_argument("config", type=Path, help="TOML file of the run")


def _add_check(commands: "_Commands[argparse.ArgumentParser]") -> None:
    text = "Validate a configuration, reach everything it names, and say what would run."
    parser = _add(commands, "check", text, _check, takes_settings=True)
    parser.add_argument("config", type=Path, help="TOML file of the run")


def _add_prepare(commands: "_Commands[argparse.ArgumentParser]") -> None:
    text = "Make run folder and database ready for processes that are started one by one (compose, Kubernetes)."
    parser = _add(commands, "prepare", text, _prepare, takes_settings=True)
    parser.add_argument("config", type=Path, help="TOML file of the run")


def _add_init_model(commands: "_Commands[argparse.ArgumentParser]") -> None:
    text = "Make a from-scratch policy: a tokenizer trained on documents, and random Llama weights."
    parser = _add(commands, "init-model", text, _init_model, takes_settings=False)
    parser.add_argument("--documents", required=True, help="file, folder or glob the tokenizer is trained on")
    parser.add_argument("--format", choices=("jsonl", "parquet", "text"), default="jsonl")
    parser.add_argument("--text-field", default="text")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new model; must not hold one already")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=6)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--num-kv-heads", type=int, default=0, help="0: as many as --num-heads")
    parser.add_argument("--intermediate-size", type=int, default=0, help="0: about 8/3 of --hidden-size")
    parser.add_argument("--context", type=int, default=1024, help="longest sequence in tokens")
    parser.add_argument("--seed", type=int, default=0)


def _add_audit(commands: "_Commands[argparse.ArgumentParser]") -> None:
    text = "Prove conservation: documents read = trained + dropped + in flight."
    parser = _add(commands, "audit", text, _audit, takes_settings=False)
    parser.add_argument("run", help="run folder, or the run's name under runs/")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def _add_report(commands: "_Commands[argparse.ArgumentParser]") -> None:
    text = "Write plots (PNG) and a Markdown summary into the run's report/ folder."
    parser = _add(commands, "report", text, _report, takes_settings=False)
    parser.add_argument("run", help="run folder, or the run's name under runs/")


def _add_demo(commands: "_Commands[argparse.ArgumentParser]") -> None:
    text = "Train the shipped tiny models in the starter world, then let its checker say what improved."
    parser = _add(commands, "demo", text, _demo, takes_settings=False)
    parser.add_argument("--quick", action="store_true", help="a minute instead of a few: fewer steps and prefixes")
    parser.add_argument("--directory", type=Path, help="where the demo's runs lie (runs/demo, or runs/demo-quick)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", type=Path, help="models of python -m starter.recipe, another world's perhaps")


def _add_sweep(commands: "_Commands[argparse.ArgumentParser]") -> None:
    text = "Run a grid of settings over several seeds in the starter world, or go on with it; ends with one table."
    parser = _add(commands, "sweep", text, _sweep, takes_settings=False)
    parser.add_argument("file", type=Path, help="TOML file of the sweep")
    parser.add_argument("--out", type=Path, help="where its runs lie (runs/NAME, the file's name)")


def _add_swap_judge(commands: "_Commands[argparse.ArgumentParser]") -> None:
    text = "Give the judge of a running compose stack other settings, and wait until it is ready with them."
    parser = _add(commands, "swap-judge", text, _swap_judge, takes_settings=False)
    parser.add_argument("settings", type=Path, help="TOML file whose [judge] section the judge gets")
    parser.add_argument("--project", default="headwater", help="compose project (headwater)")
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="seconds until it must be ready (600)"
    )


def _run(options: argparse.Namespace, overrides: list[str]) -> int:
    from cli.run import run

    return run(options.config, overrides)


def _check(options: argparse.Namespace, overrides: list[str]) -> int:
    from cli.check import check

    return check(options.config, overrides)


def _prepare(options: argparse.Namespace, overrides: list[str]) -> int:
    from cli.prepare import prepare

    return prepare(options.config, overrides)


def _init_model(options: argparse.Namespace, _rest: list[str]) -> int:
    from cli.init_model import ModelShape, init_model

    shape = ModelShape(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        num_layers=options.num_layers,
        num_heads=options.num_heads,
        num_kv_heads=options.num_kv_heads or options.num_heads,
        intermediate_size=options.intermediate_size,
        context_tokens=options.context,
    )
    return init_model(
        options.documents,
        options.out,
        shape,
        document_format=options.format,
        text_field=options.text_field,
        seed=options.seed,
    )


def _audit(options: argparse.Namespace, _rest: list[str]) -> int:
    from cli.audit import audit

    return audit(options.run, as_json=options.json)


def _report(options: argparse.Namespace, _rest: list[str]) -> int:
    from cli.report import report

    return report(options.run)


def _demo(options: argparse.Namespace, _rest: list[str]) -> int:
    from cli.demo import FULL, MODELS, QUICK, demo

    directory = options.directory or Path("runs/demo-quick" if options.quick else "runs/demo")
    size = QUICK if options.quick else FULL
    return demo(size, directory=directory, seed=options.seed, models=options.models or MODELS)


def _sweep(options: argparse.Namespace, _rest: list[str]) -> int:
    from cli.sweep import sweep

    return sweep(options.file, out=options.out or Path("runs") / options.file.stem)


def _swap_judge(options: argparse.Namespace, _rest: list[str]) -> int:
    from cli.swap_judge import swap_judge

    return swap_judge(options.settings, project=options.project, timeout_s=options.timeout)


if __name__ == "__main__":
    sys.exit(main())
