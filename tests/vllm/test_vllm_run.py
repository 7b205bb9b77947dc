"""A whole run on three real vLLM services: new weights at every step, while rollouts are in flight.

Several minutes, so it runs on demand: `make test-vllm-run`.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import starter
from cli.audit import audit_run
from cli.demo import MODELS, world_documents, world_of, world_options
from cli.run_folder import find_run
from shared.api import RolloutRequest
from shared.database import open_database
from shared.weight_store import WeightStore

STEPS = 20
TOKEN = "a-token-of-this-test-0123456789abcdef"
PROBE = [1, *range(20, 84)]
"""Token ids whose log-probs tell one version's weights from another's; two blocks of the prefix cache."""
TOLERANCE = 2e-4
"""Of a log-prob: float32 in two implementations. The versions lie further apart, see below."""
RUN_S = 1000.0
ROOT = Path(__file__).parent.parent.parent


@dataclass
class Probes:
    """What the rollout service answered while the run went on."""

    log_probs: dict[int, list[float]] = field(default_factory=dict)
    """By weight version."""
    versions: set[int] = field(default_factory=set)
    """Of rollouts that spanned an update, too."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def launched(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    documents = folder / "documents.jsonl"
    world_documents(world_of(MODELS), documents, 1000)
    on_vllm = [
        word
        for role in ("rollout", "rewriter", "judge")
        for word in (f"--{role}.engine.kind", "vllm", f"--{role}.engine.kv_cache_gib", "0.25")
    ]
    command = [
        sys.executable, "-m", "cli.main", "run", str(Path(starter.__file__).parent / "demo.toml"),
        *world_options(documents), "--run.directory", str(folder / "runs"), "--run.name", "vllm",
        "--trainer.steps", str(STEPS), "--trainer.checkpoint_every", "10", "--trainer.log_tensorboard", "false",
        "--trainer.warmup_steps", "0", "--trainer.learning_rate", "1e-3", "--weights.keep_versions", "100",
        "--rollout.port", str(port), *on_vllm,
    ]  # fmt: skip
    environ = os.environ | {"HEADWATER_TOKEN": TOKEN, "HEADWATER_ADMIN_TOKEN": TOKEN[::-1]}
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environ)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            finally:
                process.kill()


def watch(process: subprocess.Popen[bytes], url: str, output: Path) -> Probes:
    """Ask the rollout service over and over until the run ends."""
    found = Probes()
    deadline = time.monotonic() + RUN_S
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60) as client:
        while process.poll() is None:
            assert time.monotonic() < deadline, f"the run did not end:\n{output.read_text()[-4000:]}"
            try:
                probe(client, found)
            except httpx.TransportError:
                time.sleep(0.5)
            time.sleep(0.1)
    assert process.returncode == 0, output.read_text()[-4000:]
    return found


def probe(client: httpx.Client, found: Probes) -> None:
    ready = client.get("/readyz")
    if ready.status_code != 200 or ready.json()["policy_version"] in found.log_probs:
        return
    body: dict[str, Any] = {"model": "policy", "prompt": PROBE, "max_tokens": 0, "echo": True, "logprobs": 0}
    answer = client.post("/v1/completions", json=body)
    if answer.status_code == 200:
        scored = answer.json()
        found.log_probs[scored["policy_version"]] = scored["choices"][0]["logprobs"]["token_logprobs"][1:]
    request = RolloutRequest(token_ids=tuple(PROBE), starts=(40,), num_rollouts=2, max_suffix_tokens=64)
    rolled = client.post("/v1/rollouts", json=request.model_dump(mode="json"))
    if rolled.status_code == 200:
        found.versions |= {one["policy_version"] for of_start in rolled.json()["rollouts"] for one in of_start}


def expected_log_probs(store: WeightStore, version: int, folder: Path) -> torch.Tensor:
    """Of PROBE under the weights that the trainer published, in plain transformers."""
    target = folder / f"fetched-{version}"
    target.mkdir()
    store.fetch(store.manifest(version), target)
    module: Any = AutoModelForCausalLM.from_pretrained(MODELS / "policy", dtype=torch.float32)
    tensors = load_file(target / "model.safetensors")
    missing, unexpected = module.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    with torch.no_grad():
        rows = torch.log_softmax(module(torch.tensor([PROBE])).logits[0, :-1].float(), dim=-1)
    return rows.gather(1, torch.tensor(PROBE[1:])[:, None])[:, 0]


def test_a_run_on_three_vllm_services(tmp_path: Path, seen: dict[str, str]) -> None:
    port = free_port()
    with launched(tmp_path, port) as process:
        found = watch(process, f"http://127.0.0.1:{port}", tmp_path / "output")
    folder, settings = find_run(str(tmp_path / "runs" / "vllm"))
    database = open_database(settings.database_url)
    try:
        audit = audit_run(database, settings, folder)
    finally:
        database.dispose()
    assert audit.holds, audit

    store = WeightStore(settings.weight_store_url)
    assert store.versions() == list(range(STEPS + 1))
    assert len(found.log_probs) >= STEPS // 2, sorted(found.log_probs)

    expected = {version: expected_log_probs(store, version, tmp_path) for version in store.versions()}
    for version, log_probs in found.log_probs.items():
        distances = {other: float((torch.tensor(log_probs) - row).abs().max()) for other, row in expected.items()}
        assert distances.pop(version) < TOLERANCE, (version, distances)
        assert min(distances.values()) > 5 * TOLERANCE, "the versions lie too close together to be told apart"
    assert found.versions <= set(store.versions())
    seen["versions that answered as the trainer published them"] = f"{len(found.log_probs)} of {STEPS + 1}"
