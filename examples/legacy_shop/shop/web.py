"""The shop's pages: for customers an order form, for the staff Flask-Admin."""

import os

from flask import Flask, flash, redirect, render_template, request, url_for
from flask_admin import Admin
from flask_admin.contrib.sqla import ModelView

from .database import Session
from .models import GiftCard, Order, Payment, Product
from .orders import PaymentRefused, cancel_order, pay, place_order, price_list

app = Flask(__name__)
app.secret_key = os.getenv("SECRET_KEY", "for a try only")

admin = Admin(app, name="Legacy shop")
for model in (Product, GiftCard, Order, Payment):
    admin.add_view(ModelView(model, Session))


@app.teardown_appcontext
def remove_session(error):
    Session.remove()


@app.get("/")
def index():
    return render_template("shop.html", goods=price_list())


@app.post("/orders")
def order():
    form = request.form
    number = place_order(int(form["product"]), int(form["quantity"]), form["address"])
    try:
        pay(number, form["card"])
        flash(f"Order {number} is paid.")
    except PaymentRefused as refusal:
        cancel_order(number)
        flash(str(refusal))
    return redirect(url_for("index"))
