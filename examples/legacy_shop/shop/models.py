"""The shop's tables. Amounts are in cents."""

from sqlalchemy import Column, ForeignKey, Integer, String
from sqlalchemy.orm import relationship

from .database import Base


class Product(Base):
    __tablename__ = "product"

    id = Column(Integer, primary_key=True)
    name = Column(String(50), nullable=False)
    price = Column(Integer, nullable=False)

    def __str__(self):
        return self.name


class GiftCard(Base):
    """What customers pay with."""

    __tablename__ = "gift_card"

    id = Column(Integer, primary_key=True)
    code = Column(String(50), nullable=False, unique=True)
    balance = Column(Integer, nullable=False)

    def __str__(self):
        return self.code


class Order(Base):
    __tablename__ = "orders"

    id = Column(Integer, primary_key=True)
    product_id = Column(Integer, ForeignKey("product.id"), nullable=False)
    quantity = Column(Integer, nullable=False)
    address = Column(String(200), nullable=False)
    total = Column(Integer, nullable=False)

    product = relationship("Product")

    def __str__(self):
        return f"Order {self.id}"


class Payment(Base):
    __tablename__ = "payment"

    id = Column(Integer, primary_key=True)
    order_id = Column(Integer, ForeignKey("orders.id"), nullable=False, unique=True)
    card_id = Column(Integer, ForeignKey("gift_card.id"), nullable=False)
    amount = Column(Integer, nullable=False)

    order = relationship("Order")
    card = relationship("GiftCard")
