"""The shop's tables. Amounts are in cents."""

from __future__ import annotations

from sqlalchemy import ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


class Base(DeclarativeBase):
    pass


class Product(Base):
    __tablename__ = "product"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    price: Mapped[int]

    def __str__(self) -> str:
        return self.name


class GiftCard(Base):
    """What customers pay with."""

    __tablename__ = "gift_card"

    id: Mapped[int] = mapped_column(primary_key=True)
    code: Mapped[str] = mapped_column(unique=True)
    balance: Mapped[int]

    def __str__(self) -> str:
        return self.code


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    product_id: Mapped[int] = mapped_column(ForeignKey("product.id"))
    quantity: Mapped[int]
    address: Mapped[str]
    total: Mapped[int]

    product: Mapped[Product] = relationship()

    def __str__(self) -> str:
        return f"Order {self.id}"


class Payment(Base):
    __tablename__ = "payment"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey("orders.id"), unique=True)
    card_id: Mapped[int] = mapped_column(ForeignKey("gift_card.id"))
    amount: Mapped[int]

    order: Mapped[Order] = relationship()
    card: Mapped[GiftCard] = relationship()
