"""Many coroutines at once: their results, or the first error that mattered; and an event loop that is not kept waiting.
For judge, engines and collector."""

import asyncio
import gc
import sys
from collections.abc import Coroutine, Iterable
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")


async def all_of(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Their results in order. The first error cancels the others, waits for their end, and is raised by itself."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first exception in the group that is no cancellation."""
    _, others = group.split(asyncio.CancelledError)
    found: BaseException = others or group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found


@cache
def settle_process() -> None:
    """Once a process, when all that it will keep is loaded. The event loop then waits for little but its own work.

    A full pass of the garbage collector over what torch and a tokenizer leave takes a tenth of a second, so that is
    frozen, and passes over all objects are rare. A thread that encodes gives way after 1 ms instead of 5.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(2_000, 10, 5_000)
    sys.setswitchinterval(0.001)
