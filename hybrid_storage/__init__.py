"""An FSM storage for aiogram on SQLAlchemy, by an async or a synchronous session factory."""

from ._codec import CorruptDataError
from .isolation import SQLAlchemyEventIsolation
from .keys import FullKeyBuilder
from .middleware import SessionMiddleware
from .model import FSMData, declare_model
from .operations import Operations
from .storage import SQLAlchemyStorage

__all__ = [
    "CorruptDataError",
    "FSMData",
    "FullKeyBuilder",
    "Operations",
    "SQLAlchemyEventIsolation",
    "SQLAlchemyStorage",
    "SessionMiddleware",
    "declare_model",
]
