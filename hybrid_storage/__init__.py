"""An FSM storage for aiogram on SQLAlchemy, by an async or a synchronous session factory.

Begin with ``SQLAlchemyStorage``, and pass it to the dispatcher::

    from hybrid_storage import SQLAlchemyStorage

    storage = SQLAlchemyStorage(SessionLocal, Base)  # your application's
    dp = Dispatcher(storage=storage)
    dp.startup.register(storage.create_table)

Then see ``storage.create_isolation()``, for one handler at a time and one write per update, and
``storage.transaction()``, for one transaction with your own rows. Import what you need from
``hybrid_storage`` itself. Two more modules are public:

``hybrid_storage.migration``
    ``migrate()`` moves conversations here from Redis or from another table.
``hybrid_storage.testing``
    ``memory_storage()`` and a fixture of pytest's, for the tests of your handlers.

``python -m hybrid_storage`` is the command ``hybrid-storage``. Modules and packages whose names
begin with an underscore are private.
"""

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
