"""vLLM plugins for tests, installed in a folder on Python's path. vLLM loads them in every process it spawns, by their
entry points."""

from pathlib import Path

UNPACKED = """
def register():
    import vllm._custom_ops

    vllm._custom_ops._supports_onednn = False
"""
"""On a CPU vLLM packs linear weights, which can then be neither patched nor read. This keeps them as on a GPU."""

RECORDED = """
import os
from pathlib import Path

def register():
    from safetensors.torch import save_file
    from services.engine.vllm.plugin import FileTransferEngine

    if hasattr(FileTransferEngine, "received"):
        return
    FileTransferEngine.received = FileTransferEngine.receive_weights

    def receive_weights(self, update):
        self.received(update)
        folder = Path(os.environ["RECORDED_WEIGHTS"])
        file = folder / f"{len(list(folder.iterdir())):04}.safetensors"
        save_file({name: weights.detach().clone() for name, weights in self.model.named_parameters()}, file)

    FileTransferEngine.receive_weights = receive_weights
"""
"""Saves the model's weights to a file in the folder RECORDED_WEIGHTS after each update."""


def install(folder: Path, **plugins: str) -> Path:
    """Write each plugin's code as an installed module into `folder`; returns it, for PYTHONPATH."""
    folder.mkdir(exist_ok=True)
    for name, code in plugins.items():
        (folder / f"{name}_weights.py").write_text(code)
        described = folder / f"{name}_weights-1.dist-info"
        described.mkdir()
        (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-weights\nVersion: 1\n")
        (described / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{name} = {name}_weights:register\n")
    return folder
