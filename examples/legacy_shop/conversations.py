"""The bot's conversations in Flask-Admin: who is in which state, and who has fallen silent."""

from __future__ import annotations

import json
import time
from datetime import datetime, timedelta, timezone
from typing import Any

from flask import flash
from flask_admin.actions import action
from flask_admin.contrib.sqla import ModelView
from flask_admin.contrib.sqla.filters import BaseSQLAFilter, FilterEqual
from flask_admin.form import SecureForm
from markupsafe import Markup
from sqlalchemy import exists
from sqlalchemy.orm import Query, aliased

from hybrid_storage import FullKeyBuilder

from .bot import Checkout
from .shop.database import Session
from .storage import Conversation, storage

AGES = [("3600", "1 hour"), ("86400", "1 day"), ("604800", "1 week")]
STATES = [(name, name) for name in Checkout.__all_states_names__]


class IdleFor(BaseSQLAFilter):
    """Finds conversations of which no row was written to, a dialog's or a scene's included."""

    def operation(self) -> str:
        return "for at least"

    def apply(self, query: Query[Any], value: str, alias: Any = None) -> Query[Any]:
        since, newer = time.time() - int(value), aliased(Conversation)
        of_this = newer.conversation == Conversation.conversation
        is_newer = (newer.written_at > since) | newer.written_at.is_(None)
        return query.filter(Conversation.written_at <= since, ~exists().where(of_this, is_newer))

    def validate(self, value: str) -> bool:
        return value in dict(AGES)


def last_write(view: ModelView, context: Any, row: Conversation, name: str) -> str:
    if row.written_at is None:
        return "unknown"
    at = datetime.fromtimestamp(row.written_at, timezone.utc)
    age = timedelta(minutes=max(0, time.time() - row.written_at) // 60)
    return f"{at:%Y-%m-%d %H:%M} UTC, {str(age)[:-3]} h ago"


def pretty(view: ModelView, context: Any, row: Conversation, name: str) -> Markup:
    try:
        text = json.dumps(json.loads(row.data or "{}"), indent=2, ensure_ascii=False)
    except ValueError:
        text = str(row.data)
    return Markup("<pre>{}</pre>").format(text)


class ConversationView(ModelView):
    can_create = can_edit = can_delete = False
    can_view_details = named_filter_urls = True
    column_list = ("bot_id", "chat_id", "user_id", "destiny", "state", "written_at", "data")
    column_details_list = ["id", *column_list, "thread_id", "business_connection_id"]  # noqa: RUF012
    column_labels = {"written_at": "Last write"}  # noqa: RUF012
    column_default_sort = ("written_at", True)
    column_searchable_list = ("id", "state")
    column_filters = (
        FilterEqual(Conversation.state, "State", options=STATES),
        "user_id",
        IdleFor(Conversation.written_at, "Idle", options=AGES),
    )
    column_formatters = {"written_at": last_write}  # noqa: RUF012
    column_formatters_detail = {"written_at": last_write, "data": pretty}  # noqa: RUF012
    form_base_class = SecureForm  # against requests that other sites forge

    @action("reset", "Reset", "Shall the bot forget the state and the data of these conversations?")
    def reset(self, ids: list[str]) -> None:
        for id in sorted(ids):
            storage.operations.clear(Session(), FullKeyBuilder().parse(id))
        Session.commit()
        flash(f"{len(ids)} reset.")
