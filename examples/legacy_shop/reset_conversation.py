"""Show a user's conversation with the bot, and reset it: no bot, no event loop."""

from __future__ import annotations

import argparse

from .shop.database import Session
from .storage import conversation, storage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("user_id", type=int)
    key = conversation(parser.parse_args().user_id)

    session = Session()
    state = storage.operations.get_state(session, key)
    data = storage.operations.get_data(session, key)
    storage.operations.clear(session, key)
    session.commit()
    print(f"was: {state} {data}")


if __name__ == "__main__":
    main()
