"""The bot's conversations on the shop's own pages, for the support staff."""

from __future__ import annotations

import json

from flask import redirect, render_template_string, url_for
from werkzeug import Response
from wtforms import Field, Form, TextAreaField, ValidationError

from .conversations import ConversationView
from .shop.database import Session
from .shop.web import admin, app
from .storage import Conversation, conversation, storage

__all__ = ["app"]  # flask --app legacy_shop.support run


def json_object(form: Form, field: Field) -> None:
    """Refuse what the bot could not read."""
    try:
        data = json.loads(field.data)
    except ValueError as error:
        raise ValidationError(f"This is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValidationError("This is no JSON object.")


class EditableConversationView(ConversationView):
    can_edit = True
    form_columns = ("state", "data")
    form_overrides = {"data": TextAreaField}  # noqa: RUF012
    form_args = {"data": {"validators": [json_object]}}  # noqa: RUF012


admin.add_view(EditableConversationView(Conversation, Session, name="Conversations"))

PAGE = """<!doctype html>
<title>User {{ user_id }}</title>
<h1>User {{ user_id }}</h1>
<p>State: {{ state }}
<p>Data: {{ data | tojson }}
<form method="post"><button>Reset</button></form>
"""


@app.get("/conversations/<int:user_id>")
def show_conversation(user_id: int) -> str:
    state = storage.operations.get_state(Session(), conversation(user_id))
    data = storage.operations.get_data(Session(), conversation(user_id))
    return render_template_string(PAGE, user_id=user_id, state=state, data=data)


@app.post("/conversations/<int:user_id>")
def reset_conversation(user_id: int) -> Response:
    storage.operations.clear(Session(), conversation(user_id))
    Session.commit()
    return redirect(url_for("show_conversation", user_id=user_id))
