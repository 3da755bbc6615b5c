"""Text that others write, users' and Telegram's, stays text: in data, states, keys and the log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import pytest
from aiogram.fsm.storage.base import DefaultKeyBuilder, KeyBuilder, StorageKey
from anyio import create_task_group
from backends import SERVERS, Backend
from blocking import locked, statements, until
from chaos.drivers import IMPATIENCE
from conftest import Open, rows
from sqlalchemy import URL

from hybrid_storage import FullKeyBuilder, SQLAlchemyStorage

HOSTILE = [
    *["'", "''", '"', "`", "\\", "\\'", "%", "%%", "%s", "%(_row)s", ":_row", "$1", "?", "{}"],
    *["NULL", "null", '{"a": 1}', "';--", "/*", "*/", "' OR '1'='1", "$$; DELETE FROM fsm; $$"],
    "'); DROP TABLE fsm; --",
    "\\'); DROP TABLE fsm; #",
    "' UNION SELECT id, state, data FROM fsm --",
    *[":", ":destiny=x", "42:-1001234567890:8", "%3A", " ", " x "],
    *["\0", "a\0b", "\x01\x08\x1a\x7f", "\r\n\t", "\ud800"],
    *["\u2028\u202e\ufeff\u200b", "e\u0301", "\u00e9", "\U0010ffff"],
]
FORGED = "\nCRITICAL:root:all is lost"
HUGE = "'\"\\%" * 2**18  # a megabyte

KEY_BUILDERS: dict[str, KeyBuilder] = {
    "escaped": FullKeyBuilder(),
    "raw": DefaultKeyBuilder(with_bot_id=True, with_business_connection_id=True, with_destiny=True),
}
with_each_key_builder = pytest.mark.parametrize(
    "key_builder", KEY_BUILDERS.values(), ids=KEY_BUILDERS
)


async def use_as_state(storage: SQLAlchemyStorage, key: StorageKey, text: str) -> None:
    """Write a text and read it, unless it is refused."""
    with suppress(ValueError):
        await storage.set_state(key, text)
        assert await storage.get_state(key) == text


async def use_as_data(storage: SQLAlchemyStorage, key: StorageKey, texts: list[str]) -> None:
    """Write texts as fields and as values, and read them."""
    data = {text: text for text in texts}
    await storage.set_data(key, data)
    assert await storage.get_data(key) == data
    assert await storage.update_data(key, data) == data
    assert await storage.update_data(key, {texts[-1]: 1}) == {**data, texts[-1]: 1}
    assert await storage.get_value(key, texts[-1]) == 1


async def use_as_key(storage: SQLAlchemyStorage, key: StorageKey, text: str) -> None:
    """Use a conversation, unless its key is refused."""
    other = replace(key, destiny=text, business_connection_id=text)
    with suppress(ValueError):
        assert await storage.update_data(other, {"name": "Ada"}) == {"name": "Ada"}
        assert await storage.get_data(other) == {"name": "Ada"}
        await storage.clear(other)


async def use(storage: SQLAlchemyStorage, key: StorageKey, texts: list[str]) -> None:
    """Use texts wherever there is a place for one."""
    await use_as_data(storage, key, texts)
    for text in texts:
        await use_as_state(storage, key, text)
        await use_as_key(storage, key, text)
    await storage.clear(key)


@with_each_key_builder
async def test_text_is_read_back_or_refused_and_touches_no_other_row(
    backend: Backend, open_storage: Open, key: StorageKey, key_builder: KeyBuilder
) -> None:
    storage = await open_storage(backend, key_builder=key_builder)
    for n in (6, 8):
        await storage.set_state(replace(key, user_id=n), "state")
        await storage.set_data(replace(key, user_id=n), {"name": "Bob"})
    others = await rows(storage)
    await use(storage, key, HOSTILE)
    await use(storage, key, [HUGE])
    assert await rows(storage) == others


async def test_statements_are_the_same_whatever_the_text(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(backend, key_builder=KEY_BUILDERS["raw"])
    with statements(storage.table.name) as usual:
        await use(storage, key, ["harmless"])
    with statements(storage.table.name) as unusual:
        await use(storage, key, HOSTILE)
    assert len(usual) > 0
    assert {statement for _, statement in unusual} == {statement for _, statement in usual}


@pytest.mark.parametrize("backend", SERVERS, ids=str)
async def test_the_log_has_no_data_and_no_line_that_a_key_forged(
    backend: Backend,
    url_of: Callable[[Backend], URL],
    open_storage: Open,
    key: StorageKey,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Not even where a write is made again."""
    caplog.set_level(logging.DEBUG, "hybrid_storage")
    options = {"connect_args": IMPATIENCE[backend.driver]}
    storage = await open_storage(backend, engine_options=options, key_builder=KEY_BUILDERS["raw"])
    key = replace(key, destiny=FORGED)
    await storage.set_data(key, {"name": "s3cret"})
    async with create_task_group() as calls:
        with locked(backend, url_of(backend), storage, key, KEY_BUILDERS["raw"]):
            calls.start_soon(storage.set_state, key, "s3cret")
            calls.start_soon(storage.update_data, key, {"s3cret": "s3cret"})
            await until(lambda: len(caplog.records) >= 2)
    assert "s3cret" not in caplog.text
    assert FORGED not in caplog.text
