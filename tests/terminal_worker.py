"""A process in a terminal that runs the command ``hybrid-storage``: see ``test_cli.py``."""

from __future__ import annotations

import os
import sys

from hybrid_storage.__main__ import main


def run_on_terminal(path: str, environment: dict[str, str], arguments: list[str]) -> None:
    """Say that it begins, and run the command as a shell in the terminal would."""
    terminal = os.open(path, os.O_RDWR)
    for standard in range(3):
        os.dup2(terminal, standard)
    os.close(terminal)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    sys.stdout.write("begins\n")
    sys.stdout.flush()
    os.environ.update(environment)
    sys.argv = ["hybrid-storage", *arguments]
    main()
