"""One run of the shipped stack, from nothing to its last step, with everything happening to it on the way.

The tests follow each other on the same run: what one leaves behind, the next begins with.
"""

import json

import httpx
import pytest

from cli.main import main
from cli.swap_judge import READY_URL
from shared.metrics import ROLES
from tests.compose.stack import PROJECT, ROOT, SERVICES, Stack


def test_containers_have_nothing_that_they_do_not_need(stack: Stack) -> None:
    for service in SERVICES:
        container = stack.container(service)
        host = container.attrs["HostConfig"]
        assert host["ReadonlyRootfs"], service
        assert host["CapDrop"] == ["ALL"], service
        assert host["CapAdd"] is None, service
        assert host["SecurityOpt"] == ["no-new-privileges:true"], service
        assert stack.inside(service, "id", "-u").strip() != "0", service
        bindings = [one for found in host["PortBindings"].values() for one in found]
        assert all(one["HostIp"] == "127.0.0.1" for one in bindings), service
        assert bool(bindings) == (service == "rollout"), service


def test_judge_and_rewriter_cannot_reach_the_stores(stack: Stack) -> None:
    program = "import socket; socket.create_connection(('{}', {}), 3)"
    for service in ("judge", "rewriter"):
        for store, port in (("redis", 6379), ("postgres", 5432)):
            answer = stack.container(service).exec_run(["python", "-c", program.format(store, port)])
            assert answer.exit_code == 1, f"{service} reaches {store}"
    stack.inside("trainer", "python", "-c", program.format("redis", 6379))


def test_the_published_port_wants_the_token(stack: Stack) -> None:
    url = f"http://127.0.0.1:{stack.port}/v1/models"
    assert httpx.get(url, timeout=10).status_code == 401
    token = stack.inside("rollout", "printenv", "HEADWATER_TOKEN").strip()
    assert httpx.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=10).status_code == 200


def test_no_secret_is_in_what_the_run_leaves(stack: Stack) -> None:
    secrets = [
        stack.inside("trainer", "printenv", "HEADWATER_TOKEN").strip(),
        stack.inside("redis", "printenv", "REDISCLI_AUTH").strip(),
        stack.inside("postgres", "printenv", "POSTGRES_PASSWORD").strip(),
    ]
    kept = stack.inside("trainer", "cat", "runs/starter/settings.toml") + stack.query("select settings from runs")
    assert "redis:6379" in kept
    assert not any(secret in kept for secret in secrets)


@pytest.mark.parametrize("service", ["judge", "rollout", "collector", "trainer", "redis", "postgres"])
def test_who_is_killed_in_mid_run_is_started_again_and_nothing_is_lost(
    stack: Stack, figures: dict[str, str], service: str
) -> None:
    stack.wait_for_steps(2)
    before = stack.container(service).attrs
    stack.kill_inside(service)
    back_s = stack.wait(
        lambda: (
            stack.container(service).attrs["RestartCount"] > before["RestartCount"]
            and stack.state(service)["StartedAt"] != before["State"]["StartedAt"]
            and stack.is_ready(service)
        ),
        f"{service} back after a kill",
    )
    stack.wait_for_steps(2)
    assert stack.container(service).id == before["Id"]
    assert stack.audit()["holds"]
    figures[f"{service} killed: ready again after"] = f"{back_s:.0f} s"


def test_the_judge_alone_is_swapped(stack: Stack, figures: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    before = stack.lives()
    (old,) = set(stack.query("select distinct fingerprint from chunks where fingerprint <> ''").split())
    assert main(["swap-judge", str(ROOT / "configs/starter-judge-safety.toml"), "--project", PROJECT]) == 0
    told = capsys.readouterr().out
    figures["judge swapped"] = told.splitlines()[0]
    after = stack.lives()
    assert {service for service in SERVICES if before[service] != after[service]} == {"judge"}
    new = json.loads(stack.inside("judge", "python", "-m", "shared.probe", READY_URL))["fingerprint"]
    assert new != old
    assert f"fingerprint  {old} -> {new}" in told
    stack.wait(
        lambda: int(stack.query(f"select count(*) from chunks where fingerprint = '{new}'")) > 0,
        "chunks judged by the new judge",
    )
    assert stack.audit()["holds"]


def test_a_judge_that_can_not_start_is_told_with_its_log_and_the_way_back(
    stack: Stack, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = stack.folder / "broken.toml"
    broken.write_text('[judge]\nengine.model = "starter/models/absent"\n')
    assert main(["swap-judge", str(broken), "--project", PROJECT]) == 1
    told = capsys.readouterr().err
    assert "starter/models/absent" in told
    (way_back,) = [line.split() for line in told.splitlines() if line.strip().startswith("headwater swap-judge")]
    assert main(way_back[1:]) == 0
    stack.wait_for_steps(1)


def test_a_stop_drains(stack: Stack, figures: dict[str, str]) -> None:
    """Every process ends by itself, the trainer's work is in a checkpoint, and no file is half-written."""
    stack.wait_for_steps(1)
    stop_s = stack.timed("stop", *ROLES)
    figures["stop of all five in mid-run"] = f"{stop_s:.0f} s"
    assert {service: stack.state(service)["ExitCode"] for service in ROLES} == dict.fromkeys(ROLES, 0)
    checkpoints = "ls -d runs/starter/checkpoints/step-* | tail -n 1"
    leftovers = "find runs weights -name '*.tmp'"
    versions = "for v in weights/starter/v*; do test -e $v/manifest.json || echo $v; done"
    shell = ("run", "--rm", "--no-TTY", "--entrypoint", "sh", "headwater", "-c")
    assert stack.compose(*shell, f"{leftovers}; {versions}") == ""
    assert int(stack.compose(*shell, checkpoints).strip()[-8:]) == stack.step()
    findings = stack.audit()
    assert findings["holds"]
    assert findings["trained"] > 0
    figures["up --wait, resumed"] = f"{stack.timed('up', '--detach', '--wait'):.0f} s"


def test_the_stores_stop_calmly_too_and_the_run_goes_on(stack: Stack) -> None:
    stack.wait_for_steps(1)
    stack.compose("stop", "redis", "postgres")
    assert stack.state("redis")["ExitCode"] == 0
    assert stack.state("postgres")["ExitCode"] == 0
    stack.compose("up", "--detach", "--wait", "redis", "postgres")
    stack.wait_for_steps(1)


def test_the_run_comes_to_its_end(stack: Stack, figures: dict[str, str]) -> None:
    last = stack.step() + 10
    stack.set_steps(last)
    stack.compose("restart", "trainer", "collector")
    for service in ("trainer", "collector"):
        stack.wait(lambda service=service: stack.state(service)["Status"] == "exited", f"{service} at its end")  # type: ignore[misc]
        assert stack.state(service)["ExitCode"] == 0
    assert stack.query("select count(*), min(step), max(step) from steps") == f"{last}|1|{last}"
    findings = stack.audit()
    assert findings["holds"]
    assert findings["trained"] == 8 * last  # pairs_per_step, one chunk a document
    assert stack.headwater("report", "starter").strip() == "runs/starter/report/report.md"
    dropped, in_flight = sum(findings["dropped"].values()), sum(findings["in_flight"].values())
    figures["document windows in the end"] = (
        f"{findings['read']} read = {findings['trained']} trained + {dropped} dropped + {in_flight} in flight"
    )
