"""Gives up work whose caller has hung up. Used by the routes that keep an engine busy."""

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request

from shared.errors import RequestError

T = TypeVar("T")


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; it is cancelled when the caller disconnects. The body must have been read."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RequestError("the caller hung up before the answer was ready")
        return task.result()
    finally:
        for left in (task, gone):
            if not left.done():
                left.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await left


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
