"""A real trainer and real rollout services on one Redis and one store: the weights are equal at every version."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import httpx
import torch
from transformers import PreTrainedModel

from services.engine.hf.engine import TransformersEngine
from services.rollout.app import build_app
from shared import metrics
from shared.engine_settings import EngineSettings
from shared.settings import Secrets, Settings
from tests.services.serving import running, wait_until
from tests.trainer.conftest import MakeStack, assert_equal_weights, tiny_llama
from trainer.loop import Trainer

STEPS, LATE_FROM = 7, 3
POLLING = {"poll_interval_s": 0.02}


@dataclass
class Followers:
    """Looks at all replicas after every step, once they serve its weights."""

    settings: Settings
    model: Path
    running_apps: ExitStack
    engines: dict[str, TransformersEngine] = field(default_factory=dict)
    urls: dict[str, str] = field(default_factory=dict)
    compared: list[tuple[int, int]] = field(default_factory=list)
    """Version, replicas that have it."""

    def start(self, name: str) -> None:
        engine = TransformersEngine(EngineSettings(model=str(self.model), device="cpu", dtype="bfloat16"))
        rollout = self.settings.rollout.model_copy(update={"replica": name})
        app = build_app(self.settings.model_copy(update={"rollout": rollout}), Secrets(), engine=engine)
        self.urls[name], self.engines[name] = self.running_apps.enter_context(running(app)), engine

    def details(self) -> set[str]:
        """What /readyz says of each; empty if all is well."""
        return {httpx.get(f"{url}/readyz").json()["detail"] for url in self.urls.values()}

    @contextmanager
    def following(self, trainer: Trainer) -> Iterator[None]:
        begin = trainer.publisher.begin

        def begin_and_compare(model: PreTrainedModel, step: int) -> None:
            begin(model, step)
            trainer.publisher.wait()
            if step:
                self._compare(trainer, step)

        with patch.object(trainer.publisher, "begin", begin_and_compare):
            yield

    def _compare(self, trainer: Trainer, step: int) -> None:
        assert trainer.lead is not None
        publisher = trainer.lead.publisher
        trainer.lead.replicas.keep_up(step)
        assert publisher.steps[publisher.version] == step
        for name, engine in self.engines.items():
            assert engine.weight_version == publisher.version, name
            assert_equal_weights(bits(engine._started.module), bits(trainer.policy.model))
        self.compared.append((publisher.version, len(self.engines)))
        if step == LATE_FROM:
            self.start("late")


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.to(torch.bfloat16).view(torch.int16) for name, tensor in model.state_dict().items()}


def counted_failed_patches() -> float:
    return metrics.REGISTRY.get_sample_value("headwater_failed_patches_total") or 0.0


def test_two_replicas_one_of_them_late_have_the_trainers_bits_at_every_version(
    make_stack: MakeStack, policy_folder: Path
) -> None:
    stack = make_stack(steps=STEPS, pairs_per_step=3, learning_rate=1e-4, replica_wait_s=60.0)
    stack = stack.with_settings("weights", dtype="bfloat16", full_every=4).with_settings("rollout", **POLLING)
    stack.write_plain(range(STEPS))
    failed_patches = counted_failed_patches()
    with ExitStack() as apps:
        followers = Followers(stack.settings, policy_folder, apps)
        followers.start("early")
        trainer = stack.prepare()
        assert trainer.lead is not None
        trainer.lead.replicas.max_lag = 0  # of windows, the tests' rollouts are all of version 0
        with followers.following(trainer):
            assert trainer.run() == "finished"
        assert followers.compared == [(step, 1 if step <= LATE_FROM else 2) for step in range(1, STEPS + 1)]
        assert followers.details() == {""}
    store = trainer.lead.publisher.store
    forms = [store.manifest(version).form for version in store.versions()]
    assert forms == ["full", "sparse", "sparse", "sparse"]  # 4 to 7; the late one began with 0 to 3
    assert counted_failed_patches() == failed_patches


def test_a_living_replica_follows_a_trainer_that_begins_anew(make_stack: MakeStack, policy_folder: Path) -> None:
    """Store and Redis were wiped, and the new trainer does not know the replica: its versions begin below the one that
    is served."""
    stack = make_stack().with_settings("weights", dtype="bfloat16").with_settings("rollout", **POLLING)
    publisher, model = stack.prepare_lead().publisher, tiny_llama(seed=3)
    publisher.version = 40
    with ExitStack() as apps:
        followers = Followers(stack.settings, policy_folder, apps)
        followers.start("one")
        engine = followers.engines["one"]
        for step in range(2):
            publisher.publish(model, step)
        wait_until(lambda: engine.weight_version == 42, what="version 42")
        shutil.rmtree(publisher.store.root)
        anew, other = stack.prepare_lead().publisher, tiny_llama(seed=4)
        anew.version, anew.epoch = -1, "anew"
        for version in range(2):
            assert anew.publish(other, 0) == version
            wait_until(lambda version=version: engine.weight_version == version, what=f"version {version}")
            assert_equal_weights(bits(engine._started.module), bits(other))
            with torch.no_grad():
                next(other.parameters())[:3] += 1.0
        assert followers.details() == {""}
