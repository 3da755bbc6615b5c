"""An asynchronous application's admin pages of its bot's conversations, by Starlette-Admin.

    uvicorn admin_async:app --app-dir examples

serves them at http://127.0.0.1:8000/admin/. DATABASE_URL names another database than a file here.
The pages have no log-in: pass an ``auth_provider`` to ``Admin`` before others can reach them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta, timezone

from sqlalchemy import ColumnElement, and_, exists
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, aliased
from starlette.applications import Starlette
from starlette.requests import Request
from starlette_admin import ComputedField, IntegerField, StringField, TextAreaField, action
from starlette_admin.actions import ActionSelection
from starlette_admin.contrib.sqla import Admin, ModelView
from starlette_admin.filters import (
    BaseFilter,
    FilterApplyContext,
    FilterDataType,
    FilterValidationError,
)
from starlette_admin.flash import flash

from hybrid_storage import ConversationColumns, FSMData, FullKeyBuilder, SQLAlchemyStorage


class Base(DeclarativeBase):
    """The application's own."""


class Conversation(ConversationColumns, FSMData, Base):
    __tablename__ = "conversation"


engine = create_async_engine(os.getenv("DATABASE_URL", "sqlite+aiosqlite:///admin_async.db"))
SessionLocal = async_sessionmaker(engine)
storage = SQLAlchemyStorage(SessionLocal, model=Conversation)  # for the bot's Dispatcher, too

AGES = [("3600", "1 hour"), ("86400", "1 day"), ("604800", "1 week")]


class IdleForAtLeast(BaseFilter):
    """Finds conversations of which no row was written to, a dialog's or a scene's included."""

    name, label, data_type = "idle", "Idle for at least", FilterDataType.ENUM

    def get_choices(self, request: Request) -> list[tuple[str, str]]:
        return AGES

    def parse_value(self, raw: str) -> int:
        if raw not in dict(AGES):
            raise FilterValidationError("Choose one of the ages.")
        return int(raw)

    def apply(self, ctx: FilterApplyContext) -> ColumnElement[bool]:
        since, newer = time.time() - ctx.value, aliased(Conversation)
        of_this = newer.conversation == Conversation.conversation
        is_newer = (newer.written_at > since) | newer.written_at.is_(None)
        return and_(Conversation.written_at <= since, ~exists().where(of_this, is_newer))


def last_write(request: Request, row: Conversation) -> str:
    if row.written_at is None:
        return "unknown"
    at = datetime.fromtimestamp(row.written_at, timezone.utc)
    age = timedelta(minutes=max(0, time.time() - row.written_at) // 60)
    return f"{at:%Y-%m-%d %H:%M} UTC, {str(age)[:-3]} h ago"


def pretty(request: Request, row: Conversation) -> str:
    try:
        return json.dumps(json.loads(row.data or "{}"), indent=2, ensure_ascii=False)
    except ValueError:
        return str(row.data)


class ConversationView(ModelView):
    fields = (
        StringField("id", exclude_from_list=True),
        *map(IntegerField, ("bot_id", "chat_id", "user_id")),
        *map(StringField, ("destiny", "state")),
        ComputedField("written_at", "Last write", getter=last_write, filters=[IdleForAtLeast]),
        TextAreaField("data", getter=pretty, exclude_from_list=True),
    )
    sortable_fields = ("bot_id", "chat_id", "user_id", "destiny", "state", "written_at")
    searchable_fields = ("id", *sortable_fields)  # and those to filter by
    fields_default_sort = (("written_at", True),)

    def can_change(self, request: Request) -> bool:
        return False  # the bot writes, and staff resets

    can_create = can_edit = can_delete = can_import = can_change

    @action("reset", "Reset", "Shall the bot forget the state and the data of these conversations?")
    async def reset(self, request: Request, selection: ActionSelection) -> None:
        rows = await selection.rows()
        async with storage.using(request.state.session):  # which is committed after this
            for row in rows:
                await storage.clear(FullKeyBuilder().parse(row.id))
        flash(request, f"{len(rows)} reset.", "success")


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    await storage.create_table()
    yield
    await engine.dispose()


app = Starlette(lifespan=lifespan)
admin = Admin(SessionLocal, title="Bot", secret_key=os.getenv("SECRET_KEY", "for a try only"))
admin.add_view(ConversationView(Conversation))
admin.mount_to(app)
