"""Waiting for something to happen, but not for ever."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")


def wait_until(
    condition: Callable[[], Value], seconds: float = 20, otherwise: Callable[[], object] = lambda: "it did not happen"
) -> Value:
    """Return the first true value of a condition. If none comes in time, fail with what `otherwise` returns."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.01)
    return value


def told(seconds: float) -> str:
    """Return seconds as they are told, which are not measured more closely than to a tenth."""
    return f"{seconds:.1f} s" if seconds >= 0.1 else "less than 0.1 s"


async def wait_in_loop_until(condition: Callable[[], object]) -> None:
    """Wait as `wait_until` does, while the event loop goes on."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)
