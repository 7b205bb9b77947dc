"""What a run consists of; launchers on one machine never take the same port."""

import socket
from collections.abc import Iterator

import pytest

from cli.plan import REDIS_HOST as HOST
from cli.plan import Plan, Ports, is_free, make_plan
from shared.configuration import load_settings

ORIGINAL_AND_ROLLOUT = '[{"kinds": ["original", "rollout"], "num_rollouts": 2}]'
ORIGINAL_AND_REWRITE = '[{"kinds": ["original", "rewrite"], "num_rollouts": 0}]'
ORIGINAL = '[{"kinds": ["original"], "num_rollouts": 0}]'


@pytest.fixture
def ports() -> Iterator[Ports]:
    with Ports() as ports:
        yield ports


def _plan(ports: Ports, *overrides: str) -> Plan:
    return make_plan(load_settings(None, overrides, {}), ports)


def test_by_default_everything_runs(ports: Ports) -> None:
    plan = _plan(ports)
    assert plan.roles == ("rollout", "rewriter", "judge", "collector", "trainer")
    assert plan.num_processes == 6


@pytest.mark.parametrize(
    ("schedule", "objective", "services"),
    [
        (ORIGINAL_AND_ROLLOUT, "dpo", ("rollout", "judge")),
        (ORIGINAL_AND_REWRITE, "rf_nll", ("rewriter", "judge")),
        (ORIGINAL_AND_REWRITE, "sft_rewrite", ("rewriter",)),
        (ORIGINAL, "next_token", ()),
    ],
)
def test_only_what_is_needed_runs(ports: Ports, schedule: str, objective: str, services: tuple[str, ...]) -> None:
    plan = _plan(ports, "--collector.schedule", schedule, "--trainer.objective", objective)
    assert plan.roles == (*services, "collector", "trainer")


def test_what_runs_elsewhere_is_not_started(ports: Ports) -> None:
    plan = _plan(ports, "--judge.url", "http://judge:8003", "--redis.url", "redis://redis:6379/0")
    assert "judge" not in plan.roles
    assert plan.embedded_redis_port is None
    assert plan.redis_url == "redis://redis:6379/0"
    assert plan.settings.judge.base_urls == ("http://judge:8003",)


def test_a_port_that_moved_is_told_and_given_to_everybody(ports: Ports) -> None:
    taken = ports.take("127.0.0.1", 0)
    plan = _plan(ports, "--judge.port", str(taken), "--rollout.port", "0")
    moved = plan.settings.judge.port
    assert moved != taken
    assert f"port {taken} is taken: judge listens on {moved} instead" in plan.notes
    assert not any("rollout" in note for note in plan.notes)
    assert plan.ready_url("judge") == f"http://127.0.0.1:{moved}/readyz"
    assert plan.settings.judge.base_urls == (f"http://127.0.0.1:{moved}",)


def test_the_trainers_metrics_port_moves_like_the_others(ports: Ports) -> None:
    taken = ports.take("127.0.0.1", 0)
    plan = _plan(ports, "--trainer.metrics_port", str(taken))
    assert plan.settings.trainer.metrics_port not in (0, taken)
    assert any(f"port {taken} is taken: trainer" in note for note in plan.notes)
    assert _plan(ports).settings.trainer.metrics_port == 0


def test_a_token_is_made_unless_given(ports: Ports, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADWATER_TOKEN", raising=False)
    assert len(_plan(ports).secrets.token) >= 40
    monkeypatch.setenv("HEADWATER_TOKEN", "mine")
    assert _plan(ports).secrets.token == "mine"


def test_what_is_secret_in_a_url_travels_in_the_environment(ports: Ports) -> None:
    urls = {"--judge.url": "http://me:word@judge", "--redis.url": "redis://:word@redis"}
    environ = _plan(ports, *[word for pair in urls.items() for word in pair]).environ()
    assert environ["HEADWATER_JUDGE__URL"] == "http://me:word@judge"
    assert environ["HEADWATER_REDIS__URL"] == "redis://:word@redis"
    assert "HEADWATER_DATABASE__URL" not in environ


def test_children_take_settings_from_their_file_only(ports: Ports, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_JUDGE__PORT", "1")
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    environ = _plan(ports).environ()
    assert "HEADWATER_JUDGE__PORT" not in environ
    assert environ["OPENAI_API_KEY"] == "key"
    assert environ["HEADWATER_TOKEN"] in environ["HEADWATER_REDIS__URL"]


def test_a_trainer_of_several_processes_starts_under_torchrun(ports: Ports) -> None:
    plan = _plan(ports, "--trainer.num_processes", "8")
    assert plan.num_processes == _plan(ports).num_processes + 7
    words = " ".join(plan.command("trainer")[1:6])
    assert words == "-m torch.distributed.run --standalone --nproc-per-node=8 --shutdown-timeout=25"


def test_a_busy_port_is_replaced() -> None:
    with socket.create_server((HOST, 0)) as server, Ports() as ports:
        busy = server.getsockname()[1]
        assert not is_free(HOST, busy)
        assert ports.take(HOST, busy) not in (0, busy)


def test_two_launchers_do_not_share_a_port_before_anybody_listens() -> None:
    with Ports() as one, Ports() as other:
        port = one.take(HOST, 0)
        assert other.take(HOST, port) != port
        assert one.take(HOST, port) != port


def test_a_port_is_free_again_when_its_launcher_has_ended() -> None:
    with Ports() as one:
        port = one.take(HOST, 0)
    with Ports() as other:
        assert other.take(HOST, port) == port
