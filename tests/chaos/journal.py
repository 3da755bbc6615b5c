"""A file of events."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any


class Journal(logging.Handler):
    """What was noted stays, even if the process is killed."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.WARNING)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def note(self, *event: object) -> None:
        """Append an event."""
        os.write(self._file, f"{json.dumps(event)}\n".encode())

    def emit(self, record: logging.LogRecord) -> None:
        """Note that a call is made again, which is what the storage logs."""
        self.note("retry", record.getMessage())


def events(path: Path) -> list[Any]:
    """Return what has been noted."""
    return [json.loads(line) for line in path.read_text().splitlines()]
