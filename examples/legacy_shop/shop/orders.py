"""What the shop does. Each function uses the global session, and commits what it has done."""

from .database import Base, Session, engine
from .models import GiftCard, Order, Payment, Product


class PaymentRefused(Exception):
    """The gift card does not pay for the order."""


def set_up():
    """Create the tables and, where there are none, a few goods and gift cards."""
    Base.metadata.create_all(engine)
    if Session.query(Product).count() == 0:
        Session.add(Product(name="Tea", price=450))
        Session.add(Product(name="Coffee", price=720))
        Session.add(GiftCard(code="BIRTHDAY", balance=5000))
        Session.add(GiftCard(code="LEFTOVER", balance=100))
    Session.commit()
    Session.remove()


def money(cents):
    return f"{cents / 100:.2f}"


def price_list():
    """Return a line for each product, by its number."""
    products = Session.query(Product).order_by(Product.id)
    return {product.id: f"{product.name}, {money(product.price)}" for product in products}


def total(product_id, quantity):
    """Return what an order would cost."""
    return Session.query(Product).filter_by(id=product_id).one().price * quantity


def place_order(product_id, quantity, address):
    """Add an order, and return its number."""
    order = Order(
        product_id=product_id,
        quantity=quantity,
        address=address,
        total=total(product_id, quantity),
    )
    Session.add(order)
    Session.commit()
    return order.id


def pay(order_id, card_code):
    """Pay an order with a gift card, or raise PaymentRefused."""
    order = Session.query(Order).filter_by(id=order_id).one()
    card = Session.query(GiftCard).filter_by(code=card_code).with_for_update().one_or_none()
    if card is None:
        Session.rollback()
        raise PaymentRefused(f"There is no gift card {card_code}.")
    if card.balance < order.total:
        message = f"Of {money(order.total)}, only {money(card.balance)} is on the card."
        Session.rollback()
        raise PaymentRefused(message)
    card.balance -= order.total
    Session.add(Payment(order=order, card=card, amount=order.total))
    Session.commit()


def cancel_order(order_id):
    """Remove an order that was not paid."""
    Session.query(Order).filter_by(id=order_id).delete()
    Session.commit()
