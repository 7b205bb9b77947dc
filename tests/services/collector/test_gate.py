"""Back-pressure: who blocks and who unblocks."""

import asyncio

from services.collector.gate import Gate


async def entered(gate: Gate, count: int) -> int:
    """How many of `count` waiting windows get in now."""
    tasks = [asyncio.create_task(gate.enter()) for _ in range(count)]
    await asyncio.sleep(0.01)
    inside = sum(task.done() for task in tasks)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    return inside


def test_no_more_than_the_limit_are_in_flight() -> None:
    async def run() -> None:
        gate = Gate(max_in_flight=3, max_backlog=100)
        assert await entered(gate, 5) == 3
        gate.leave()
        assert await entered(gate, 5) == 1

    asyncio.run(run())


def test_unread_documents_count_against_the_backlog() -> None:
    async def run() -> None:
        gate = Gate(max_in_flight=10, max_backlog=4)
        gate.note_backlog(3, written_before=0)
        assert await entered(gate, 5) == 1
        gate.note_backlog(0, written_before=0)
        assert await entered(gate, 5) == 3

    asyncio.run(run())


def test_a_written_window_still_counts_until_the_trainer_has_read_it() -> None:
    async def run() -> None:
        gate = Gate(max_in_flight=10, max_backlog=1)
        assert await entered(gate, 1) == 1
        gate.note_written()
        gate.leave()
        assert await entered(gate, 1) == 0
        gate.note_backlog(0, written_before=gate.num_written)
        assert await entered(gate, 1) == 1

    asyncio.run(run())


def test_a_look_begun_before_a_write_does_not_hide_it() -> None:
    gate = Gate(max_in_flight=10, max_backlog=10)
    before = gate.num_written
    gate.note_written()
    gate.note_backlog(5, written_before=before)
    assert gate.unread == 6


def test_a_waiting_window_gets_in_as_soon_as_one_leaves() -> None:
    async def run() -> None:
        gate = Gate(max_in_flight=1, max_backlog=10)
        await gate.enter()
        waiting = asyncio.create_task(gate.enter())
        await asyncio.sleep(0.01)
        assert not waiting.done()
        gate.leave()
        await asyncio.wait_for(waiting, 1)
        assert gate.in_flight == 1

    asyncio.run(run())
