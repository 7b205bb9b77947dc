"""Claim: in the starter world a tournament chooses as well as all pairs do, in half the calls, and trains as well.

    python -m benchmarks.judge_schedules [--quick] [--json FILE] [--work FOLDER]

Whole runs of the demo's settings, one for each schedule and seed, through `headwater run`: real services, the shipped
judge, and 8 rollouts a chunk (10 candidates, 90 ordered pairs). Then the chunks that the all-pairs run has recorded are
judged again by the real judge with each schedule. The world's checker, which no judge sees, says what was chosen and
rejected, and what the policies write on held-out prefixes. Runs that are there already are not made again.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import httpx
import sqlalchemy as sa

from benchmarks.collector import free_ports, process
from benchmarks.report import Report, parser
from cli.demo import STARTER, ask_checker, world_documents, world_of, world_options
from cli.run_folder import find_run
from shared.api import JudgedText, JudgementItem, JudgementRequest, JudgementResponse
from shared.checkpoint_state import newest_policy
from shared.database import CandidateRow, ChunkRow, transaction
from shared.records import Judgement
from shared.runs import reading_run
from starter.checker import Checker
from starter.evaluate import PolicyReport

SCHEDULES = ("tournament", "all_pairs", "pivot")
_SCHEDULE = "--judge.criteria.quality.schedule"
_CANDIDATES = json.dumps([{"kinds": ["original", "rewrite", "rollout"], "num_rollouts": 8}])
READY_S = 120.0


@dataclass(frozen=True)
class Size:
    steps: int
    num_prefixes: int
    num_chunks: int
    """That are judged again."""


FULL = Size(steps=60, num_prefixes=400, num_chunks=300)
QUICK = Size(steps=12, num_prefixes=100, num_chunks=60)


@dataclass(frozen=True)
class Pool:
    """One recorded chunk."""

    prefix: str
    original: str
    texts: tuple[str, ...]


def main() -> int:
    options = parser(__doc__ or "")
    options.add_argument("--work", type=Path, help="folder of the runs")
    options.add_argument("--seeds", type=int, default=3, help="runs of each schedule")
    given = options.parse_args()
    size = QUICK if given.quick else FULL
    seeds = range(1 if given.quick else given.seeds)
    folder = given.work or Path("runs/judge-schedules-quick" if given.quick else "runs/judge-schedules")
    folder.mkdir(parents=True, exist_ok=True)
    world_documents(world_of(STARTER / "models"), folder / "documents.jsonl", 4000)
    report = Report()
    for name in SCHEDULES[:2]:
        _report_runs(report, name, [_run(folder, name, seed, size) for seed in seeds], size)
    pools = recorded_pools(folder / "all_pairs-0", size.num_chunks)
    for name in SCHEDULES:
        _report_choices(report, name, pools, judged_again(folder, name, pools))
    report.at_least("tournament: share of the all-pairs gap", _ratio(report, "gap between the two, defects"), 0.97)
    report.at_most("tournament: share of the all-pairs comparisons", _ratio(report, "comparisons a chunk"), 0.5)
    return report.finish(given.json)


def _ratio(report: Report, figure: str) -> float:
    tournament, all_pairs = (float(report.figures[f"judged again, {name}: {figure}"]) for name in SCHEDULES[:2])
    return tournament / all_pairs


def _run(folder: Path, schedule: str, seed: int, size: Size) -> Path:
    """The run's folder. Its wall seconds lie in `seconds` there."""
    name = f"{schedule}-{seed}"
    if not (folder / name / "seconds").exists():
        began = time.monotonic()
        words = [
            "run", str(STARTER / "demo.toml"), *world_options(folder / "documents.jsonl"), "--run.name", name,
            "--run.directory", str(folder), "--run.seed", str(seed), "--trainer.steps", str(size.steps),
            "--collector.schedule", _CANDIDATES, _SCHEDULE, schedule,
        ]  # fmt: skip
        print("headwater", *words, flush=True)
        subprocess.run([sys.executable, "-m", "cli.main", *words], check=True)
        (folder / name / "seconds").write_text(f"{time.monotonic() - began:.1f}\n", encoding="utf-8")
    return folder / name


def _report_runs(report: Report, name: str, runs: Sequence[Path], size: Size) -> None:
    found = [_checked(run, size, seed) for run, seed in zip(runs, range(len(runs)), strict=True)]
    for figure in ("all_clean", "win_rate", "no_fact_wrong"):
        values = [100 * getattr(one, figure).mean for one in found]
        report.figures[f"run, {name}: {figure}, %"] = fmean(values)
        report.figures[f"run, {name}: {figure}, lowest to highest"] = f"{min(values):.1f} to {max(values):.1f}"
    report.figures[f"run, {name}: judge's calls a chunk"] = fmean(_calls_a_chunk(run) for run in runs)
    report.figures[f"run, {name}: seconds"] = fmean(float((run / "seconds").read_text()) for run in runs)


def _checked(run: Path, size: Size, seed: int) -> PolicyReport:
    models = STARTER / "models"
    world = world_of(models)
    base = ask_checker(models / "policy", world, num_prefixes=size.num_prefixes, seed=seed)
    return ask_checker(newest_policy(run), world, num_prefixes=size.num_prefixes, seed=seed, base=base)


def _calls_a_chunk(folder: Path) -> float:
    _, settings = find_run(str(folder))
    with reading_run(settings) as run, transaction(run.database) as session:
        return float(session.scalar(sa.select(sa.func.avg(ChunkRow.num_calls)).where(ChunkRow.num_calls > 0)) or 0.0)


def recorded_pools(folder: Path, limit: int) -> list[Pool]:
    """Of the run's first chunks that have their original and at least two candidates."""
    _, settings = find_run(str(folder))
    with reading_run(settings) as run, transaction(run.database) as session:
        chunks = session.scalars(sa.select(ChunkRow).where(ChunkRow.num_calls > 0).order_by(ChunkRow.id)).all()
        rows = session.scalars(sa.select(CandidateRow).order_by(CandidateRow.id)).all()
        of_chunk: dict[int, list[CandidateRow]] = {}
        for row in rows:
            of_chunk.setdefault(row.chunk_id, []).append(row)
        pools = (_pool(chunk, of_chunk.get(chunk.id, [])) for chunk in chunks)
        return [pool for pool in pools if pool][:limit]


def _pool(chunk: ChunkRow, rows: Sequence[CandidateRow]) -> Pool | None:
    original = next((row.text for row in rows if "original" in row.kinds.split(",")), None)
    texts = tuple(dict.fromkeys(row.text for row in rows))
    return Pool(chunk.prefix, original, texts) if original is not None and len(texts) > 1 else None


def judged_again(folder: Path, schedule: str, pools: Sequence[Pool]) -> list[Judgement]:
    """By the demo's judge as a process, with this schedule."""
    with _judge(folder, schedule) as url, httpx.Client(base_url=url, timeout=600, trust_env=False) as client:
        return [_ask(client, pool) for pool in pools]


def _ask(client: httpx.Client, pool: Pool) -> Judgement:
    texts = tuple(JudgedText(text=text) for text in pool.texts)
    start = len(pool.prefix)
    item = JudgementItem(start=start, end=start + len(pool.original), candidates=texts)
    request = JudgementRequest(text=pool.prefix + pool.original, items=(item,))
    headers = {"Content-Type": "application/json"}
    answer = client.post("/v1/judgements", content=request.model_dump_json(), headers=headers)
    answer.raise_for_status()
    (judgement,) = JudgementResponse.model_validate_json(answer.content).judgements
    if not isinstance(judgement, Judgement):
        raise SystemExit(f"a chunk was not judged: {judgement.reason}")
    return judgement


@contextmanager
def _judge(folder: Path, schedule: str) -> Iterator[str]:
    (port,) = free_ports(1)
    options = [*world_options(folder / "documents.jsonl"), "--judge.port", str(port), _SCHEDULE, schedule]
    command = [sys.executable, "-m", "services", "judge", "--config", str(STARTER / "demo.toml"), *options]
    url = f"http://127.0.0.1:{port}"
    with process(command, folder / f"judge-{schedule}.log"):
        deadline = time.monotonic() + READY_S
        while not _is_ready(url):
            if time.monotonic() > deadline:
                raise SystemExit(f"the judge is not ready, its log is {folder / f'judge-{schedule}.log'}")
            time.sleep(0.2)
        yield url


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5, trust_env=False).is_success
    except httpx.TransportError:
        return False


def _report_choices(report: Report, name: str, pools: Sequence[Pool], judgements: Sequence[Judgement]) -> None:
    """The truth about what is chosen and rejected: defects less correct facts, by the checker."""
    checker = Checker(world_of(STARTER / "models"))
    gaps, best, worst = [], [], []
    for pool, judgement in zip(pools, judgements, strict=True):
        verdicts = [checker.check(text, prefix=pool.prefix) for text in pool.texts]
        rewards = [reward if reward is not None else 0.5 for reward in judgement.rewards]
        chosen, rejected = rewards.index(max(rewards)), rewards.index(min(rewards))
        gaps.append(verdicts[rejected].num_defects - verdicts[chosen].num_defects)
        best.append(verdicts[chosen].order == max(verdict.order for verdict in verdicts))
        worst.append(verdicts[rejected].order == min(verdict.order for verdict in verdicts))
    before = f"judged again, {name}:"
    report.figures[f"{before} gap between the two, defects"] = fmean(gaps)
    report.figures[f"{before} chosen is one of the best, %"] = 100 * fmean(best)
    report.figures[f"{before} rejected is one of the worst, %"] = 100 * fmean(worst)
    report.figures[f"{before} calls a chunk"] = fmean(judgement.num_calls for judgement in judgements)
    report.figures[f"{before} comparisons a chunk"] = fmean(len(judgement.comparisons) for judgement in judgements)


if __name__ == "__main__":
    sys.exit(main())
