"""How long a cluster takes no writes, as seen by a plain client without the storage."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

from sqlalchemy import URL, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

_PAUSE = 0.05  # seconds between two writes
_PATIENCE = 60  # seconds for the first write, and for the one after a fault


class Probe:
    """Writes all the time, each time on a connection of its own; a context manager."""

    def __init__(self, url: URL, connect_args: Mapping[str, object]) -> None:
        """Start with nothing written.

        :param url: the cluster, with a synchronous driver
        :param connect_args: the driver's time-outs, without which it might wait for ever
        """
        self.longest = 0.0
        """Seconds between two writes that succeeded, at most."""
        self._engine = create_engine(url, poolclass=NullPool, connect_args=dict(connect_args))
        self._ends = False
        self._written = 0
        self._thread = threading.Thread(target=self._write_on, daemon=True)

    def __enter__(self) -> Probe:
        self._thread.start()
        self.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends = True
        self._thread.join()

    def wait(self) -> None:
        """Wait until it has written once more."""
        enough = self._written + 2  # one may be on its way
        deadline = time.monotonic() + _PATIENCE
        while self._written < enough:
            assert time.monotonic() < deadline, "the cluster takes no writes"
            time.sleep(_PAUSE)

    def _write_on(self) -> None:
        last: float | None = None
        while not self._ends:
            try:
                self._write()
            except DBAPIError:
                pass
            else:
                now = time.monotonic()
                self.longest = max(self.longest, now - (last or now))
                last = now
                self._written += 1
            time.sleep(_PAUSE)

    def _write(self) -> None:
        with self._engine.begin() as connection:
            if not self._written:
                connection.execute(text("CREATE TABLE IF NOT EXISTS probe (n INTEGER NOT NULL)"))
            connection.execute(text("DELETE FROM probe"))
            connection.execute(text("INSERT INTO probe VALUES (:n)"), {"n": self._written})
