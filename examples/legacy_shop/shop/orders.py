"""What the shop does. Each function works in its caller's transaction, and none commits."""

from __future__ import annotations

from sqlalchemy.orm import Session

from .models import GiftCard, Order, Payment, Product


class PaymentRefused(Exception):
    """The gift card does not pay for the order."""


def money(cents: int) -> str:
    return f"{cents / 100:.2f}"


def price_list(session: Session) -> dict[int, str]:
    """Return a line for each product, by its number."""
    products = session.query(Product).order_by(Product.id)
    return {product.id: f"{product.name}, {money(product.price)}" for product in products}


def total(session: Session, product_id: int, quantity: int) -> int:
    """Return what an order would cost."""
    return session.query(Product).filter_by(id=product_id).one().price * quantity


def place_order(session: Session, product_id: int, quantity: int, address: str) -> int:
    """Add an order.

    :return: its number
    """
    order = Order(
        product_id=product_id,
        quantity=quantity,
        address=address,
        total=total(session, product_id, quantity),
    )
    session.add(order)
    session.flush()
    return order.id


def pay(session: Session, order_id: int, card_code: str) -> None:
    """Pay an order with a gift card.

    :raises PaymentRefused: if there is no such card, or not enough on it
    """
    order = session.query(Order).filter_by(id=order_id).one()
    card = session.query(GiftCard).filter_by(code=card_code).with_for_update().one_or_none()
    if card is None:
        raise PaymentRefused(f"There is no gift card {card_code}.")
    if card.balance < order.total:
        raise PaymentRefused(f"Of {money(order.total)}, only {money(card.balance)} is on the card.")
    card.balance -= order.total
    session.add(Payment(order=order, card=card, amount=order.total))
