"""What is completed in the caller's task behaves as if it had a task of its own."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import anyio
import pytest

from hybrid_storage._cancellation import completed


async def test_it_returns_and_raises_what_the_coroutine_does() -> None:
    async def work(value: object) -> object:
        await asyncio.sleep(0)
        await asyncio.sleep(0.001)
        if isinstance(value, Exception):
            raise value
        return value

    assert await completed(work(5)) == 5
    with pytest.raises(KeyError):
        await completed(work(KeyError("five")))


@pytest.mark.parametrize("pause", [0, 0.01])
@pytest.mark.parametrize("times", [1, 3])
async def test_a_cancellation_waits_for_the_end(pause: float, times: int) -> None:
    steps: list[int] = []

    async def work() -> None:
        for step in range(4):
            await asyncio.sleep(pause)
            steps.append(step)

    task = asyncio.ensure_future(completed(work()))
    await asyncio.sleep(0)
    for _ in range(times):
        task.cancel("enough")
        task.cancel()
        await asyncio.sleep(pause)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert steps == [0, 1, 2, 3]


async def test_what_else_waits_for_a_future_comes_first() -> None:
    """asyncio's own callbacks on it, for one: they let go of a socket before it is used again."""
    future = asyncio.get_running_loop().create_future()
    order: list[str] = []
    future.add_done_callback(lambda _: order.append("callback"))

    async def work() -> None:
        await future
        order.append("work")

    task = asyncio.ensure_future(completed(work()))
    await asyncio.sleep(0)
    task.cancel()
    future.set_result(None)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert order == ["callback", "work"]


async def test_a_cancellation_hides_the_error_that_comes_after_it() -> None:
    async def work() -> None:
        await asyncio.sleep(0.01)
        raise KeyError

    task = asyncio.ensure_future(completed(work()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_an_exit_is_not_hidden_by_a_cancellation() -> None:
    async def work() -> None:
        with pytest.raises(RuntimeError):
            await asyncio.sleep(0.01)
            raise RuntimeError
        raise SystemExit(5)

    async def main() -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().call_soon(task.cancel)
        await completed(work())

    with pytest.raises(SystemExit):
        asyncio.run(main())


async def test_a_cancellation_between_the_answer_and_the_waking_is_not_lost() -> None:
    answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def work() -> int:
        return await answer

    task = asyncio.ensure_future(completed(work()))
    await asyncio.sleep(0)
    answer.set_result(5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_time_out_inside_cancels_what_is_inside() -> None:
    async def work() -> str:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.sleep(60), 0.01)
        if sys.version_info >= (3, 11):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await asyncio.sleep(60)
        with anyio.move_on_after(0.01) as scope:
            await anyio.sleep(60)
        assert scope.cancelled_caught
        return "went on"

    assert await completed(work()) == "went on"


async def test_the_coroutine_may_cancel_its_own_task() -> None:
    async def work() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)

    with pytest.raises(asyncio.CancelledError):
        await completed(work())
    task: Any = asyncio.current_task()
    if sys.version_info >= (3, 11):
        assert task.cancelling() == 0
    await asyncio.sleep(0)


async def test_an_awaited_future_that_is_cancelled_cancels_the_coroutine_alone() -> None:
    answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(answer.cancel)

    async def work() -> str:
        try:
            await answer
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            return "went on"
        return "not cancelled"

    assert await completed(work()) == "went on"


async def test_it_nests() -> None:
    steps: list[str] = []

    async def inner() -> None:
        await asyncio.sleep(0.01)
        steps.append("inner")

    async def outer() -> None:
        await completed(inner())
        steps.append("outer")

    task = asyncio.ensure_future(completed(outer()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert steps == ["inner", "outer"]


async def test_a_cancelled_scope_does_not_keep_the_event_loop_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[None] = loop.create_future()
    callbacks: list[object] = []
    call_soon = loop.call_soon

    def counted(callback: Any, *args: Any, **kwargs: Any) -> asyncio.Handle:
        callbacks.append(callback)
        return call_soon(callback, *args, **kwargs)

    async def work() -> None:
        await answer

    async def call() -> None:
        with anyio.CancelScope() as scope:
            loop.call_soon(scope.cancel)
            await completed(work())

    task = asyncio.ensure_future(call())
    await asyncio.sleep(0.01)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "call_soon", counted)
        await asyncio.sleep(0.05)
    assert not task.done()
    assert len(callbacks) < 20
    answer.set_result(None)
    await task
