"""The twin for users' tests."""

from __future__ import annotations

import pytest
from aiogram.fsm.storage.base import StorageKey
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from hybrid_storage import SQLAlchemyStorage
from hybrid_storage.testing import fsm_storage, memory_storage

__all__ = ["fsm_storage"]


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)


async def test_the_fixture_is_a_storage_like_any_other(
    fsm_storage: SQLAlchemyStorage[Session],
    key: StorageKey,
) -> None:
    assert await fsm_storage.update_data(key, {"pair": (1, 2), 3: "three"}) == {  # type: ignore[dict-item]
        "pair": [1, 2],
        "3": "three",
    }
    with pytest.raises(ZeroDivisionError):
        async with fsm_storage.transaction():
            await fsm_storage.set_state(key, "gone")
            raise ZeroDivisionError
    assert await fsm_storage.get_state(key) is None


async def test_the_applications_tables_are_there_too(key: StorageKey) -> None:
    storage = memory_storage(metadata=Base)

    def place_order(session: Session) -> None:
        session.add(Order())
        session.commit()

    async with storage.transaction():
        await storage.run_sync(place_order)
        await storage.set_state(key, "ordered")
    engine = await storage.run_sync(lambda session: session.get_bind().engine)
    with sessionmaker(engine)() as session:
        assert session.query(Order).count() == 1
        assert storage.operations.get_state(session, key) == "ordered"
    await storage.close()
