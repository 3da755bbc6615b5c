"""How a storage's calls reach the database: in the session that they join, or by themselves.

For ``storage.py``, ``transactions.py``, ``unit_of_work.py`` and ``isolation.py``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

from .calls import Call, confirmation
from .retries import warning_if_slow, with_retries
from .runner import Runner
from .scopes import Scope, ScopeClosed

T = TypeVar("T")


class Access:
    """What a storage, its units of work and its isolations reach the database by."""

    def __init__(self, runner: Runner, retry_for: float, slow_after: float) -> None:
        """Remember what to use; nothing is joined so far."""
        self.runner: Runner = runner
        self.retry_for: float = retry_for
        self.slow_after: float = slow_after
        self.joined: ContextVar[Scope | None] = ContextVar("joined", default=None)

    def scope(self) -> Scope | None:
        """Return the scope that calls join here: the innermost that is still open."""
        scope = self.joined.get()
        while scope is not None and not scope.is_open:
            scope = scope.parent
        return scope

    async def execute(
        self,
        call: Call[T],
        attempt: Callable[[], Awaitable[T]] | None = None,
        *,
        is_apart: bool = False,
        retry_for: float | None = None,
    ) -> T:
        """Run a call in the scope that it joins, or else by itself.

        :param call: what to run in the scope; for the log otherwise
        :param attempt: awaited again where it fails for reasons that pass; by default, to run the
            call on a connection of its own
        :param is_apart: join no transaction, unless that holds the one lock of a database
        :param retry_for: for how many seconds; by default the storage's
        """
        with warning_if_slow(self.slow_after, call):
            scope = self.scope()
            if scope is not None and (not is_apart or scope.holds_write_lock()):
                with suppress(ScopeClosed):
                    return await scope.execute(call)
            attempt = attempt or partial(self.runner.execute, call)
            seconds = self.retry_for if retry_for is None else retry_for
            confirm = self.confirming(call) if call.writes else None
            return await with_retries(attempt, seconds, call, confirm)

    def confirming(self, call: Call[Any]) -> Callable[[], Awaitable[None]]:
        """Return what to await when a write has been made again: see :func:`confirmation`."""
        return partial(self.runner.execute, confirmation(call))
