"""Many coroutines at once: their results, or the first error that mattered. For judge, engines and collector."""

import asyncio
from collections.abc import Coroutine, Iterable
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
