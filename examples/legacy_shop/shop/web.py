"""The shop's pages: for customers an order form, for the staff Flask-Admin."""

from __future__ import annotations

import os

from flask import Flask, flash, redirect, render_template, request, url_for
from flask_admin import Admin
from flask_admin.contrib.sqla import ModelView
from werkzeug import Response

from .database import SessionLocal, db
from .models import GiftCard, Order, Payment, Product
from .orders import PaymentRefused, pay, place_order, price_list

app = Flask(__name__)
app.secret_key = os.getenv("SECRET_KEY", "for a try only")

admin = Admin(app, name="Legacy shop")
for model in (Product, GiftCard, Order, Payment):
    admin.add_view(ModelView(model, db))


@app.teardown_appcontext
def remove_session(error: BaseException | None) -> None:
    db.remove()


@app.get("/")
def index() -> str:
    return render_template("shop.html", goods=price_list(db()))


@app.post("/orders")
def order() -> Response:
    form = request.form
    try:
        with SessionLocal.begin() as session:
            number = place_order(
                session, int(form["product"]), int(form["quantity"]), form["address"]
            )
            pay(session, number, form["card"])
        flash(f"Order {number} is paid.")
    except PaymentRefused as refusal:
        flash(str(refusal))
    return redirect(url_for("index"))
