"""An FSM storage for aiogram on SQLAlchemy, by an async or a synchronous session factory."""

from ._codec import CorruptDataError
from ._unit import LockLostError
from .columns import ConversationColumns, state_index
from .conversations import Operations
from .finding import FoundConversation
from .isolation import SQLAlchemyEventIsolation
from .keys import FullKeyBuilder
from .middlewares import FlushMiddleware, SessionMiddleware
from .model import FSMData, declare_lock_table, declare_model
from .storage import SQLAlchemyStorage

__version__ = "1.0.0"

__all__ = [
    "ConversationColumns",
    "CorruptDataError",
    "FSMData",
    "FlushMiddleware",
    "FoundConversation",
    "FullKeyBuilder",
    "LockLostError",
    "Operations",
    "SQLAlchemyEventIsolation",
    "SQLAlchemyStorage",
    "SessionMiddleware",
    "__version__",
    "declare_lock_table",
    "declare_model",
    "state_index",
]
