"""The comparisons of recorded chunks, for people."""

import sqlalchemy as sa

from cli.report import write_report
from cli.report_chunks import comparison_lines
from shared.database import migrate
from shared.records import Comparison, Lease
from tests.cli.conftest import MadeRun
from tests.shared.scored import scored_window


def record(made: MadeRun, *, text: str = " river", value: float | None = 0.75) -> None:
    window = scored_window(text=text)
    (chunk,) = window.chunks
    assert chunk.judgement is not None
    compared = (
        Comparison(criterion="quality", first=1, second=0, value=value),
        Comparison(criterion="quality", first=0, second=1, value=0.25),
        Comparison(criterion="quality", first=0, second=1, value=0.5),
        Comparison(criterion="quality", first=0, second=1, value=None),
    )
    update = {"rewards": (0.75, None), "barred": (0,), "comparisons": compared}
    judged = chunk.model_copy(update={"judgement": chunk.judgement.model_copy(update=update)})
    window = window.model_copy(update={"chunks": (judged, chunk.model_copy(update={"start": 3}))})
    lease = Lease(0, "a", made.run.ledger.take_part(0, after=0))
    made.run.record_chunks(window, ["The old town lies by the", "p"], lease)


def test_the_page_says_who_beat_whom_in_which_order(made: MadeRun) -> None:
    record(made)
    made.step(1, loss=1.0)
    lines = write_report(made.engine, made.settings, made.folder).read_text().splitlines()
    at = lines.index("### Window 0.0.0.0, suffix from token 2")
    assert lines[at + 2] == "Prefix: … The old town lies by the"
    assert lines[at + 6 : at + 8] == ["| 1 | original | 0.750, barred | river |", "| 2 | rollout | unscored | hill |"]
    assert lines[at + 11 : at + 15] == [
        "| 1 | quality | 2 | 1 | 0.750 | 2 beats 1 |",
        "| 2 | quality | 1 | 2 | 0.250 | 2 beats 1 |",
        "| 3 | quality | 1 | 2 | 0.500 | tie |",
        "| 4 | quality | 1 | 2 |  | no readable verdict |",
    ]
    assert not any("suffix from token 3" in line for line in lines)


def test_texts_of_documents_stay_text_in_the_page(made: MadeRun) -> None:
    record(made, text=" a | b\n![x](http://host/y)")
    (line,) = [line for line in comparison_lines(made.engine, made.run.name) if line.startswith("| 1 | original")]
    assert line.endswith(r"| a \| b \!\[x\](http://host/y) |")


def test_a_run_without_comparisons_says_so(made: MadeRun) -> None:
    (line,) = comparison_lines(made.engine, made.run.name)
    assert "no recorded chunk was judged in pairs" in line


def test_a_database_of_the_schema_before_is_read_too() -> None:
    database = sa.create_engine("sqlite://", poolclass=sa.pool.StaticPool)
    migrate(database, revision="0003")
    assert comparison_lines(database, "r") == ["None: this run's database has an earlier schema."]
    database.dispose()
