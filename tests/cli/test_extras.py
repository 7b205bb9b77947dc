"""What needs an extra says in one sentence which one, and nothing else of the package does."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.demo import QUICK, run_demo
from cli.swap_judge import ComposeStack
from services.collector.sources.huggingface import HuggingFaceReader
from shared.errors import HeadwaterError
from tests.cli.conftest import MadeRun
from trainer.figures import TensorBoardSink

EXTRAS = {"matplotlib", "datasets", "tensorboard", "wandb", "docker", "s3fs"}


@pytest.mark.parametrize(
    ("module", "extra", "use"),
    [
        ("matplotlib", "report", lambda folder: run_demo(QUICK, directory=folder)),
        ("torch.utils.tensorboard", "tensorboard", lambda folder: TensorBoardSink(folder, resume_step=0)),
        ("datasets", "huggingface", lambda folder: HuggingFaceReader("a", subset="", split="b", columns=()).manifest()),
        ("docker", "compose", lambda folder: ComposeStack("headwater")),
    ],
)
def test_what_is_missing_is_named_with_its_extra(
    module: str, extra: str, use: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(HeadwaterError, match=rf"pip install 'headwater\[{extra}\]'"):
        use(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_report_is_refused_before_anything_is_written(made: MadeRun) -> None:
    program = "import sys; sys.modules['matplotlib'] = None; from cli.main import main; sys.exit(main(sys.argv[1:]))"
    made.step(1, loss=1.0)
    answer = subprocess.run([sys.executable, "-c", program, "report", made.folder.path], capture_output=True, text=True)
    assert answer.returncode == 1
    assert answer.stderr == "headwater: the plots need matplotlib: pip install 'headwater[report]'\n"
    assert list(made.folder.report.iterdir()) == []


def test_no_module_loads_what_only_an_extra_brings() -> None:
    modules = ["cli.run", "cli.check", "cli.report", "cli.demo", "cli.sweep", "cli.swap_judge", "trainer.figures"]
    modules += ["services.collector.sources.huggingface"]
    program = f"import sys, {', '.join(modules)}; print(*{{name.split('.')[0] for name in sys.modules}})"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert not EXTRAS & set(loaded.split())
