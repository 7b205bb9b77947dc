"""Many coroutines at once: their results, or the first error that mattered; and an event loop that is not kept waiting.
For judge, engines and collector."""

import asyncio
import gc
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
def settle_heap() -> None:
    """Once a process, when all that it will keep is loaded: the garbage collector need not look at it any more.

    A full pass over what torch and a tokenizer leave takes a tenth of a second, in which nobody is answered.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 20, 100)
