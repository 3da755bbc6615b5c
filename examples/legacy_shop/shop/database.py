"""The shop's one engine, and what its sessions are made with."""

from __future__ import annotations

import os

from sqlalchemy import create_engine
from sqlalchemy.orm import scoped_session, sessionmaker

from .models import Base, GiftCard, Product

engine = create_engine(os.getenv("DATABASE_URL", "sqlite:///legacy_shop.db"))
SessionLocal = sessionmaker(engine)
db = scoped_session(SessionLocal)  # a session for each of Flask's requests


def set_up() -> None:
    """Create the tables and, where there are none, a few goods and gift cards."""
    Base.metadata.create_all(engine)
    with SessionLocal.begin() as session:
        if session.query(Product).count() == 0:
            session.add(Product(name="Tea", price=450))
            session.add(Product(name="Coffee", price=720))
            session.add(GiftCard(code="BIRTHDAY", balance=5000))
            session.add(GiftCard(code="LEFTOVER", balance=100))
