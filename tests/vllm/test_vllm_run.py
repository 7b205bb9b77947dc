"""Whole runs on real vLLM services: new weights at every step, while rollouts are in flight.

Several minutes, so they run on demand: `make test-vllm-run`.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file, save
from transformers import AutoConfig, AutoModelForCausalLM

import starter
from cli.audit import audit_run
from cli.demo import MODELS, world_documents, world_of, world_options
from cli.run_folder import find_run
from shared.api import RolloutRequest
from shared.database import open_database
from shared.settings import Settings
from shared.weights.state import parse_state, state_checksum
from shared.weights.store import Manifest, WeightStore
from tests.services.collector.processes import RedisProcess, free_port
from tests.vllm.plugins import RECORDED, UNPACKED, install

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
    log_probs: dict[int, list[float]] = field(default_factory=dict)
    """By weight version."""
    versions: set[int] = field(default_factory=set)
    """Of rollouts that spanned an update, too."""


def environ_of(*plugins: Path, **more: str) -> dict[str, str]:
    """Of a run's processes. `plugins` are folders with plug-ins for vLLM."""
    tokens = {"HEADWATER_TOKEN": TOKEN}
    return os.environ | tokens | {"PYTHONPATH": os.pathsep.join(map(str, plugins))} | more


@contextmanager
def launched(
    folder: Path, port: int, *options: str, steps: int = STEPS, environ: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """`headwater run` in the starter world, rollout service at `port`. Its output goes to `folder`/output."""
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
        "--trainer.steps", str(steps), "--trainer.checkpoint_every", "10",
        "--trainer.warmup_steps", "0", "--weights.keep_versions", "100",
        "--rollout.port", str(port), *on_vllm, *options,
    ]  # fmt: skip
    with started(command, folder / "output", environ=environ) as process:
        yield process


@contextmanager
def started(command: list[str], log: Path, *, environ: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
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
    if ready.status_code != 200 or ready.json()["weight_version"] in found.log_probs:
        return
    body: dict[str, Any] = {"model": "policy", "prompt": PROBE, "max_tokens": 0, "echo": True, "logprobs": 0}
    answer = client.post("/v1/completions", json=body)
    if answer.status_code == 200:
        scored = answer.json()
        found.log_probs[scored["weight_version"]] = scored["choices"][0]["logprobs"]["token_logprobs"][1:]
    request = RolloutRequest(token_ids=tuple(PROBE), starts=(40,), num_rollouts=2, max_suffix_tokens=64)
    rolled = client.post("/v1/rollouts", json=request.model_dump(mode="json"))
    if rolled.status_code == 200:
        found.versions |= {one["weight_version"] for of_start in rolled.json()["rollouts"] for one in of_start}


def audited(folder: Path) -> Settings:
    run, settings = find_run(str(folder / "runs" / "vllm"))
    database = open_database(settings.database_url)
    try:
        audit = audit_run(database, settings, run)
    finally:
        database.dispose()
    assert audit.holds, audit
    return settings


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
    with launched(tmp_path, port, "--trainer.learning_rate", "1e-3", environ=environ_of()) as process:
        found = watch(process, f"http://127.0.0.1:{port}", tmp_path / "output")
    settings = audited(tmp_path)
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


def test_two_replicas_one_late_hold_the_trainers_weights_bit_for_bit(tmp_path: Path, seen: dict[str, str]) -> None:
    """In bfloat16 with sparse versions, the second replica from half of the run on. After each update the memory of the
    engine core has the checksum that the trainer gave that version."""
    plugins = install(tmp_path / "plugins", unpacked=UNPACKED, recorded=RECORDED)
    first, again, late = (Replica(tmp_path, name, plugins) for name in ("first", "again", "late"))
    redis_server = RedisProcess(tmp_path)
    redis_server.start()
    options = [
        "--redis.url", redis_server.url, "--rollout.engine.dtype", "bfloat16", "--trainer.learning_rate", "2e-5",
        "--trainer.max_policy_lag", "3", "--trainer.replica_wait_s", "60", "--weights.full_every", "3",
    ]  # fmt: skip
    start_late = [
        sys.executable, "-m", "services", "rollout", "--config", str(tmp_path / "runs/vllm/processes.toml"),
        "--redis.url", redis_server.url, "--rollout.port", str(late.port), "--rollout.replica", "late",
    ]  # fmt: skip
    try:
        with launched(tmp_path, first.port, *options, environ=first.environ) as run:
            rolled_until(first, version=STEPS // 2, run=run)
            assert run.wait(RUN_S) == 0, (tmp_path / "output").read_text()[-4000:]
        with (
            started(start_late, tmp_path / "late", environ=late.environ),
            launched(tmp_path, again.port, *options, steps=2 * STEPS, environ=again.environ) as run,
        ):
            rolled_until(late, version=2 * STEPS + 1, run=run)
            assert run.wait(RUN_S) == 0, (tmp_path / "output").read_text()[-4000:]
    finally:
        redis_server.stop()
    store = WeightStore(audited(tmp_path).weight_store_url)
    manifests = [store.manifest(version) for version in store.versions()]
    assert [manifest.version for manifest in manifests] == list(range(2 * STEPS + 2))  # one more for the second start
    assert {manifest.form for manifest in manifests} == {"full", "sparse"}
    for replica in (first, again, late):
        updates = replica.updates(manifests)
        assert updates == sorted(updates)
        assert len(set(updates)) > STEPS // 2, "it did not follow the run"
        seen[f"{replica.name} replica: checksums in memory are the trainer's"] = f"versions {updates}"


@dataclass(frozen=True)
class Replica:
    """A rollout service whose weights in memory are recorded."""

    folder: Path
    name: str
    plugins: Path
    port: int = field(default_factory=free_port)

    @property
    def environ(self) -> dict[str, str]:
        self.records.mkdir(exist_ok=True)
        return environ_of(self.plugins, RECORDED_WEIGHTS=str(self.records))

    @property
    def records(self) -> Path:
        return self.folder / f"recorded-{self.name}"

    def updates(self, manifests: Sequence[Manifest]) -> list[int]:
        """The versions whose weights lay in the engine core's memory, one for each update, in order."""
        # A second start publishes the same weights under a new number: both count as the newer one here.
        version_of = {manifest.state_checksum: manifest.version for manifest in manifests}
        states = [parse_state(save(unfused(file)), where=file.name) for file in sorted(self.records.iterdir())]
        return [version_of[state_checksum(state)] for state in states]


def unfused(file: Path) -> dict[str, torch.Tensor]:
    """vLLM's tensors of the starter policy as a checkpoint has them: vLLM joins the projections of queries, keys and
    values, those of gate and up too, and adds rows to the embedding."""
    config = AutoConfig.from_pretrained(MODELS / "policy")
    heads = [config.head_dim * number for number in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
    fused = {
        "qkv_proj": dict(zip(("q_proj", "k_proj", "v_proj"), heads, strict=True)),
        "gate_up_proj": dict.fromkeys(("gate_proj", "up_proj"), config.intermediate_size),
    }
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(file).items():
        part = next((part for part in fused if part in name), "")
        if part:
            rows = torch.split(tensor, list(fused[part].values()))
            tensors |= {name.replace(part, one): row.clone() for one, row in zip(fused[part], rows, strict=True)}
        else:
            tensors[name] = tensor[: config.vocab_size].clone() if "embed_tokens" in name else tensor
    return tensors


def rolled_until(replica: Replica, *, version: int, run: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + RUN_S
    served = -1
    request = RolloutRequest(token_ids=tuple(PROBE), starts=(40,), num_rollouts=2, max_suffix_tokens=64)
    url = f"http://127.0.0.1:{replica.port}"
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60) as client:
        while served < version:
            assert time.monotonic() < deadline, f"{replica.name} serves version {served}"
            assert run.poll() in (None, 0), (replica.folder / "output").read_text()[-4000:]
            try:
                ready = client.get("/readyz")
                if ready.status_code == 200:
                    served = ready.json()["weight_version"]
                    client.post("/v1/rollouts", json=request.model_dump(mode="json")).raise_for_status()
                    continue
            except httpx.TransportError:
                pass  # it does not listen yet
            time.sleep(0.5)
