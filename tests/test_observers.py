"""Whoever watches the application's statements sees the storage's, from that moment on."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import sentry_sdk
from aiogram.fsm.storage.base import StorageKey
from backends import POSTGRESQL, SERVERS, Backend
from conftest import Open, engine_of
from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sentry_sdk.integrations.sqlalchemy import SqlalchemyIntegration
from sentry_sdk.transport import Transport
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError

from hybrid_storage import SQLAlchemyStorage

numbers = itertools.count()


async def use(storage: SQLAlchemyStorage, key: StorageKey) -> None:
    """Make one call of each kind: a read, a write, and one of two statements."""
    await storage.set_state(key, "waiting")
    await storage.get_state(key)
    await storage.update_data(key, {"number": next(numbers)})


def of_table(texts: list[str], storage: SQLAlchemyStorage) -> list[str]:
    return [text for text in texts if storage.table.name in text]


@pytest.mark.parametrize("backend", SERVERS, ids=str)
async def test_listeners_see_each_statement_whenever_they_were_registered(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(backend)
    await use(storage, key)
    seen: list[str] = []

    def note(connection: object, cursor: object, statement: str, *_: object) -> None:
        seen.append(statement)

    engine = engine_of(storage)
    event.listen(engine, "before_cursor_execute", note)
    await use(storage, key)
    assert len(of_table(seen, storage)) >= 4
    event.remove(engine, "before_cursor_execute", note)
    count = len(seen)
    await use(storage, key)
    assert len(seen) == count


@pytest.mark.parametrize("backend", SERVERS, ids=str)
async def test_echo_logs_each_statement(
    backend: Backend, open_storage: Open, key: StorageKey, caplog: pytest.LogCaptureFixture
) -> None:
    storage = await open_storage(backend)
    await use(storage, key)
    with caplog.at_level(logging.INFO, logger="sqlalchemy.engine"):
        engine_of(storage).echo = True
        await use(storage, key)
        engine_of(storage).echo = False
    assert len(of_table([each.getMessage() for each in caplog.records], storage)) >= 4


@pytest.fixture
def spans() -> InMemorySpanExporter:
    """Return what OpenTelemetry would send."""
    return InMemorySpanExporter()


@pytest.mark.parametrize("backend", SERVERS, ids=str)
async def test_opentelemetry_has_a_span_for_each_statement(
    backend: Backend, open_storage: Open, key: StorageKey, spans: InMemorySpanExporter
) -> None:
    storage = await open_storage(backend)
    await use(storage, key)
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    instrumentor = SQLAlchemyInstrumentor()
    instrumentor.instrument(
        engine=engine_of(storage), tracer_provider=provider, skip_dep_check=True
    )
    try:
        await use(storage, key)
    finally:
        instrumentor.uninstrument()
        provider.shutdown()
    attributes = [span.attributes or {} for span in spans.get_finished_spans()]
    texts = [str(each.get("db.statement")) for each in attributes]
    assert len(of_table(texts, storage)) >= 4


class Kept(Transport):
    """Keeps what Sentry would send."""

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.transactions: list[Any] = []

    def capture_envelope(self, envelope: Any) -> None:
        transaction = envelope.get_transaction_event()
        if transaction is not None:
            self.transactions.append(transaction)


@pytest.fixture
def sentry() -> Iterator[Kept]:
    """Return what Sentry would send, of everything."""
    transport = Kept()
    sentry_sdk.init(
        dsn="http://key@127.0.0.1/1",
        transport=transport,
        traces_sample_rate=1.0,
        default_integrations=False,
        integrations=[SqlalchemyIntegration()],
    )
    yield transport
    sentry_sdk.get_client().close()
    sentry_sdk.init()


@pytest.mark.parametrize("backend", SERVERS, ids=str)
async def test_sentry_has_a_span_for_each_statement(
    backend: Backend, open_storage: Open, key: StorageKey, sentry: Kept
) -> None:
    storage = await open_storage(backend)
    with sentry_sdk.start_transaction(name="update"):
        await use(storage, key)
    (transaction,) = sentry.transactions
    texts = [str(span.get("description")) for span in transaction["spans"]]
    assert len(of_table(texts, storage)) >= 4


@pytest.mark.parametrize("backend", POSTGRESQL, ids=str)
async def test_an_error_of_the_server_is_provoked_once(
    backend: Backend, open_storage: Open, key: StorageKey
) -> None:
    storage = await open_storage(backend)
    engine = engine_of(storage)
    statements: list[str] = []
    errors: list[object] = []
    event.listen(engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    event.listen(engine, "handle_error", errors.append)
    await storage.run_sync(lambda session: storage.table.drop(session.connection()))
    statements.clear()
    with pytest.raises(DBAPIError, match="is missing: create it with"):
        await storage.set_state(key, "waiting")
    assert len(of_table(statements, storage)) == len(errors) == 1
