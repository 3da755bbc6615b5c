"""What does not pass is not waited for: a wrong password, database or host."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import asyncpg
import psycopg
import pytest
from aiogram.fsm.storage.base import StorageKey
from backends import MARIADB, POSTGRESQL, SQLALCHEMY_2_0, Backend
from sqlalchemy import URL, create_engine
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from hybrid_storage import SQLAlchemyStorage
from hybrid_storage._engine.errors import is_transient

RETRY_FOR = 30.0  # seconds; what is retried takes at least so long
AT_ONCE = RETRY_FOR / 3

# SQLAlchemy 2.0 does not wrap what asyncpg raises while it connects.
NOT_CONNECTED = (DBAPIError, OSError, *([asyncpg.PostgresError] if SQLALCHEMY_2_0 else []))


@pytest.mark.parametrize("wrong", ["password", "database", "host"])
@pytest.mark.parametrize("backend", [*POSTGRESQL, *MARIADB], ids=str)
async def test_a_wrong_setting_is_raised_at_once(
    backend: Backend, wrong: str, url_of: Callable[[Backend], URL], key: StorageKey
) -> None:
    url = url_of(backend)
    url = {
        "password": url.set(username="nobody_of_that_name", password="wrong"),
        "database": url.set(database="no_such_database"),
        "host": url.set(host="no-such-host.invalid", query={}),
    }[wrong]
    engine = backend.engine(url)
    storage = SQLAlchemyStorage(backend.factory(engine), retry_for=RETRY_FOR)
    began = time.monotonic()
    with pytest.raises(NOT_CONNECTED):
        await storage.get_state(key)
    assert time.monotonic() - began < AT_ONCE


def packet(kind: bytes, body: bytes) -> bytes:
    """Return a message of PostgreSQL's protocol."""
    return kind + struct.pack("!i", 4 + len(body)) + body


@contextmanager
def server_that_refuses(severity: str, text: str, *, asks: bool) -> Iterator[int]:
    """Stand in for a server in another language, which turns a client away; return its port.

    :param text: what it says; nothing at all if it is empty
    :param asks: whether it asks for the password before
    """

    def refuse() -> None:
        client, _ = listener.accept()
        with client:
            client.recv(4096)  # who wants to connect
            if asks:
                client.sendall(packet(b"R", struct.pack("!i", 3)))
                client.recv(4096)  # the password
            if text:
                fields = f"S{severity}\0VFATAL\0CXX000\0M{text}\0\0"
                client.sendall(packet(b"E", fields.encode()))

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as threads:
        refusing = threads.submit(refuse)
        yield listener.getsockname()[1]
        refusing.result()


@pytest.mark.parametrize(
    ("severity", "text", "asks", "passes"),
    [
        ("FATAL", 'password authentication failed for user "u"', True, False),
        ("FATAL", "Passwort-Authentifizierung für Benutzer »u« fehlgeschlagen", True, False),
        ("ВАЖНО", 'пользователь "u" не прошёл проверку подлинности', True, False),
        ("FATAL", "das Datenbanksystem startet", False, True),
        ("FATAL", "the database system is starting up", False, True),
        ("FATAL", "sorry, too many clients already", True, True),
        ("FATAL", "the database system is not yet accepting connections", False, True),
        ("FATAL", 'database "d" does not exist', False, False),
        ("", "", True, True),
    ],
)
def test_psycopgs_answers_while_it_connects(
    severity: str, text: str, asks: bool, passes: bool
) -> None:
    with server_that_refuses(severity, text, asks=asks) as port:
        url = URL.create("postgresql+psycopg", "u", "secret", "127.0.0.1", port, "d")
        engine = create_engine(url, connect_args={"sslmode": "disable", "gssencmode": "disable"})
        with pytest.raises(OperationalError) as raised:
            engine.connect()
    assert text in str(raised.value)
    assert is_transient(raised.value) is passes


class MySQLError(Exception):
    """What MySQL's drivers raise: a number and a text."""


def by_number(number: int, text: str = "") -> DBAPIError:
    return OperationalError(None, None, MySQLError(number, text))


@pytest.mark.parametrize("number", [1044, 1045, 1049, 1146, 1698, 1105])
def test_mysql_numbers_that_do_not_pass(number: int) -> None:
    assert not is_transient(by_number(number))


@pytest.mark.parametrize("number", [1047, 1205, 1213, 2003, 2006, 2013, 3101, 8002, 8005, 9007])
def test_mysql_numbers_that_pass(number: int) -> None:
    assert is_transient(by_number(number))


def test_vitess_tells_by_its_text() -> None:
    assert is_transient(by_number(1105, "target: ks.0.primary: primary is not serving"))


def test_a_pooler_that_has_the_statement_already_passes() -> None:
    class Duplicate(Exception):
        sqlstate = "42P05"

    error: Any = Duplicate()
    assert is_transient(OperationalError("SELECT 1", {}, error))


def test_a_driver_that_cannot_run_on_this_event_loop_does_not_pass() -> None:
    error = psycopg.InterfaceError("Psycopg cannot use the 'ProactorEventLoop'")
    assert not is_transient(InterfaceError(None, None, error))
