"""The whole collector against real HTTP, Redis and SQLite."""

from collections.abc import Callable
from pathlib import Path

from shared.settings import Secrets, Settings
from tests.services.collector.processes import served
from tests.services.collector.runs import collect_all, write_documents
from tests.services.collector.stub_services import StubServices

MakeSettings = Callable[..., Settings]


def test_every_document_reaches_the_stream_with_all_its_candidates(make_settings: MakeSettings, tmp_path: Path) -> None:
    path = write_documents(tmp_path / "documents.jsonl", 6)
    stub = StubServices()
    with served(stub.app) as url:
        seen = collect_all(make_settings(url, documents={"path": str(path)}), Secrets(token="word"))
    documents = seen.take_all()
    assert sorted(document.source_id for document in documents) == [f"d{index}" for index in range(6)]
    for document in documents:
        for chunk in document.chunks:
            assert [candidate.kind for candidate in chunk.candidates] == ["original", "rewrite", "rollout", "rollout"]
            assert chunk.judgement is not None
            assert chunk.judgement.rewards == (1.0, 0.75, 0.5, 0.25)
    assert seen.balance.scored == 6
    assert seen.balance.holds
    assert {headers["authorization"] for headers in stub.headers} == {"Bearer word"}
