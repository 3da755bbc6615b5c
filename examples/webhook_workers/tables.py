"""The application's database: engine, session factory, and a table where steps are booked."""

from __future__ import annotations

import os

from sqlalchemy import BigInteger, String, create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

engine = create_engine(os.getenv("DATABASE_URL", "sqlite:///webhook_workers.db"))
SessionLocal = sessionmaker(engine)


class Base(DeclarativeBase):
    """The storage's tables join these."""


class Step(Base):
    """An answer that a user gave to one of the form's questions."""

    __tablename__ = "step"

    # Telegram sends an update again until it is answered: here it would be found.
    update_id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    user_id: Mapped[int] = mapped_column(BigInteger, index=True)
    number: Mapped[int]
    question: Mapped[str] = mapped_column(String(20))
    worker: Mapped[int]
    # By time.monotonic(), which the processes of a machine share.
    began: Mapped[float]
    ended: Mapped[float]
