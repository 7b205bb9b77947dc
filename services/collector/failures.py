"""What is inside the exception groups of task groups: one failure ends the work, the others only followed."""

import asyncio


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first exception in the group that is no cancellation."""
    leaves = list(_leaves(group))
    return next((leaf for leaf in leaves if not isinstance(leaf, asyncio.CancelledError)), leaves[0])


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]
