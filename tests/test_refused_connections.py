"""What does not pass is not waited for: a wrong password, database or host."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from aiogram.fsm.storage.base import StorageKey
from backends import MARIADB, POSTGRESQL, Backend
from sqlalchemy import URL
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from hybrid_storage import SQLAlchemyStorage
from hybrid_storage._engine.errors import is_transient

RETRY_FOR = 30.0  # seconds; what is retried takes at least so long
AT_ONCE = RETRY_FOR / 3


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
    with pytest.raises((DBAPIError, OSError)):
        await storage.get_state(key)
    assert time.monotonic() - began < AT_ONCE


class Connection:
    """The part of psycopg's ``pgconn`` that tells how far an attempt to connect has come."""

    def __init__(self, used_password: bool) -> None:
        self.used_password = used_password
        self.needs_password = False


def connecting(text: str, *, used_password: bool = False) -> DBAPIError:
    """Return what SQLAlchemy raises if psycopg cannot connect."""
    error = psycopg.OperationalError(f'connection to server at "h", port 5432 failed: {text}')
    error._pgconn = Connection(used_password)  # type: ignore[assignment]
    return OperationalError(None, None, error)


@pytest.mark.parametrize(
    ("text", "used_password", "passes"),
    [
        ('FATAL:  password authentication failed for user "u"', True, False),
        ("FATAL:  Passwort-Authentifizierung für Benutzer »u« fehlgeschlagen", True, False),
        ('ВАЖНО:  пользователь "u" не прошёл проверку подлинности', True, False),
        ("FATAL:  das Datenbanksystem startet", False, True),
        ("FATAL:  the database system is starting up", False, True),
        ("FATAL:  sorry, too many clients already", True, True),
        ("FATAL:  the database system is not yet accepting connections", False, True),
        ('FATAL:  database "d" does not exist', False, False),
        ("server closed the connection unexpectedly", True, True),
        ("Connection refused", False, True),
        ("could not translate host name", False, False),
    ],
)
def test_psycopgs_answers_while_it_connects(text: str, used_password: bool, passes: bool) -> None:
    assert is_transient(connecting(text, used_password=used_password)) is passes


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
