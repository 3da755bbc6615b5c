"""Workers: calls wait no longer than they must, and every call gets its answer."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import anyio
import pytest
from anyio import to_thread

from hybrid_storage import _threads
from hybrid_storage._threads import Crew


async def are_answered(calls: Sequence[asyncio.Future[Any]], gate: threading.Event) -> bool:
    """Tell whether calls are answered while others wait at a gate; then open it."""
    with anyio.move_on_after(10):
        await asyncio.wait(calls)
    answered = all(call.done() for call in calls)
    gate.set()
    await asyncio.gather(*calls)
    return answered


async def test_calls_that_take_long_are_done_at_the_same_time() -> None:
    crew = Crew(8)
    together = threading.Barrier(8)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as calls:
            for _ in range(8):
                calls.start_soon(crew.do, partial(together.wait, 10))


async def test_there_are_no_more_workers_than_allowed() -> None:
    crew = Crew(2)
    threads: set[int] = set()

    def work() -> None:
        threads.add(threading.get_ident())

    async with anyio.create_task_group() as calls:
        for _ in range(50):
            calls.start_soon(crew.do, work)
    assert 1 <= len(threads) <= 2


async def test_answers_go_to_those_who_asked() -> None:
    crew = Crew(4)

    async def ask(number: int) -> None:
        if number % 7 == 0:
            with pytest.raises(ValueError, match=str(number)):
                await crew.do(partial(float, f"number {number}"))
        else:
            assert await crew.do(lambda: number) == number

    async with anyio.create_task_group() as calls:
        for number in range(300):
            calls.start_soon(ask, number)


async def test_the_event_loop_is_not_woken_for_each_of_many_quick_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_threads, "_QUICK", 3600.0)
    crew = Crew(1)
    loop = asyncio.get_running_loop()
    wake = loop.call_soon_threadsafe
    woken: list[object] = []

    def count(callback: Callable[[], object], *args: Any, **options: Any) -> asyncio.Handle:
        if callback == crew._answer:
            woken.append(callback)
        return wake(callback, *args, **options)

    monkeypatch.setattr(loop, "call_soon_threadsafe", count)
    calls = [crew.do(partial(int, number)) for number in range(50)]
    assert await asyncio.gather(*calls) == list(range(50))
    assert 1 <= len(woken) <= 2


async def test_an_answer_does_not_wait_for_calls_that_take_long() -> None:
    crew = Crew(2)
    gate = threading.Event()
    quick = [asyncio.ensure_future(crew.do(lambda: 5)) for _ in range(3)]
    slow = [asyncio.ensure_future(crew.do(lambda: gate.wait(20))) for _ in range(8)]
    assert await are_answered(quick, gate)
    assert await asyncio.gather(*quick, *slow) == [5] * 3 + [True] * 8


async def test_an_answer_that_took_long_waits_for_no_other_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_threads, "_PATIENCE", 3600.0)
    crew = Crew(1)
    gate = threading.Event()
    first = asyncio.ensure_future(crew.do(lambda: time.sleep(2 * _threads._QUICK)))
    others = [asyncio.ensure_future(crew.do(lambda: gate.wait(20))) for _ in range(4)]
    assert await are_answered([first], gate)
    assert await asyncio.gather(*others) == [True] * 4


async def test_a_call_that_comes_when_a_worker_has_just_left_is_done() -> None:
    crew = Crew(1)
    for _ in range(4):
        assert await crew.do(lambda: 5) == 5
        await asyncio.sleep(_threads._LINGER)


async def test_a_call_that_is_cancelled_before_it_begins_is_not_done() -> None:
    crew = Crew(1)
    gate = threading.Event()
    done: list[str] = []
    first = asyncio.ensure_future(crew.do(lambda: gate.wait(10)))
    await asyncio.sleep(0.01)
    second = asyncio.ensure_future(crew.do(lambda: done.append("second")))
    await asyncio.sleep(0.01)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    gate.set()
    assert await first
    assert await crew.do(lambda: 5) == 5
    assert done == []


async def test_workers_that_somebody_cancels_are_replaced() -> None:
    crew = Crew(1)
    assert await crew.do(lambda: 5) == 5
    for worker in list(crew._workers):
        worker.cancel()
    with anyio.fail_after(10):
        assert await crew.do(lambda: 6) == 6
        assert await crew.do(lambda: 7) == 7


async def test_a_call_fails_if_there_can_be_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    crew = Crew(1)

    async def no_thread(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("anyio.to_thread.run_sync", no_thread)
    with anyio.fail_after(10):
        answers = await asyncio.gather(
            *(crew.do(lambda: 5) for _ in range(3)), return_exceptions=True
        )
    assert [str(answer) for answer in answers] == ["can't start new thread"] * 3


async def test_an_answer_does_not_wait_where_there_can_be_no_more_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_thread = to_thread.run_sync
    begun: list[object] = []
    refused = asyncio.Event()

    async def one_thread(*args: Any, **options: Any) -> None:
        begun.append(args)
        if len(begun) > 1:
            refused.set()
            raise RuntimeError("can't start new thread")
        await in_thread(*args, **options)

    monkeypatch.setattr("anyio.to_thread.run_sync", one_thread)
    monkeypatch.setattr(_threads, "_QUICK", 3600.0)
    crew = Crew(5)
    go, gate = threading.Event(), threading.Event()
    first = asyncio.ensure_future(crew.do(lambda: go.wait(20)))
    others = [asyncio.ensure_future(crew.do(lambda: gate.wait(20))) for _ in range(4)]
    await refused.wait()
    await asyncio.sleep(0.01)
    go.set()
    assert await are_answered([first], gate)
    assert await asyncio.gather(first, *others) == [True] * 5


def test_workers_end_with_their_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_threads, "_LINGER", 3600.0)
    before = set(threading.enumerate())

    async def main() -> None:
        assert await Crew(4).do(lambda: 5) == 5

    asyncio.run(main())
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive()


def test_a_call_cancelled_before_it_begins_keeps_no_event_loop() -> None:
    crews: list[Crew] = []
    loops: list[weakref.ref[asyncio.AbstractEventLoop]] = []

    async def cancel_one() -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        crews.append(Crew(1))
        call = asyncio.ensure_future(crews[0].do(lambda: None))
        with anyio.CancelScope() as scope:
            scope.cancel()
            await crews[0].do(lambda: None)
        await call
        last = asyncio.ensure_future(crews[0].do(lambda: None))
        last.cancel()
        await asyncio.wait([last])

    asyncio.run(cancel_one())
    gc.collect()
    assert [loop() for loop in loops] == [None]
