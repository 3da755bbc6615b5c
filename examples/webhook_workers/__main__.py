"""Two workers, and what Telegram does: python -m webhook_workers [--without-isolation]

Many users send many updates at once, each user's to both workers. Afterwards the steps that the
application has booked tell whether two of a user's overlapped, or one was lost or made twice.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
from sqlalchemy import select
from sqlalchemy.orm import Session

from .tables import Base, SessionLocal, Step, engine

QUESTIONS = ["name", "age", "city"]


@contextmanager
def workers(number: int, **environment: str) -> Generator[list[str]]:
    """Run workers, and return where they listen."""
    with ExitStack() as stack:
        started = [stack.enter_context(worker(environment)) for _ in range(number)]
        yield [process.stdout.readline().strip() for process in started if process.stdout]


@contextmanager
def worker(environment: dict[str, str]) -> Generator[subprocess.Popen[str]]:
    """Run a worker."""
    command = [sys.executable, "-m", "webhook_workers.worker"]
    environment = {"BOT_TOKEN": "42:stand-in", **os.environ, **environment}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()


def updates(users: int, each: int) -> list[dict[str, Any]]:
    """Return so many updates of each of so many new users, those of all users mixed."""
    first = time.time_ns() // 1_000_000
    ids = itertools.count(first)
    return [update(next(ids), first + user) for _ in range(each) for user in range(users)]


def update(update_id: int, user_id: int) -> dict[str, Any]:
    """Return an update: a message from a user's private chat."""
    user = {"id": user_id, "is_bot": False, "first_name": "User"}
    chat = {"id": user_id, "type": "private", "first_name": "User"}
    message = {"message_id": update_id, "date": 1_700_000_000, "chat": chat, "from": user}
    return {"update_id": update_id, "message": {**message, "text": "an answer"}}


class Telegram:
    """Posts updates, as many at a time as it is given.

    :param client: what to post by
    :param urls: where the workers listen
    """

    def __init__(self, client: aiohttp.ClientSession, urls: Sequence[str]) -> None:
        self._client = client
        self._urls = urls
        self._posted: Counter[int] = Counter()  # by user
        #: how often an update was answered by an error, or not at all, and posted again for that
        self.resent = 0

    async def post(self, update: dict[str, Any]) -> str | None:
        """Post an update, again and again until a worker answers with 200.

        A user's updates go to the workers in turn.

        :return: the text of the message that the answer asks to send, None if it asks for nothing
        """
        user = update["message"]["from"]["id"]
        while True:
            self._posted[user] += 1
            url = self._urls[self._posted[user] % len(self._urls)]
            with suppress(aiohttp.ClientError):  # the worker is dead, or died before it answered
                async with self._client.post(url, json=update) as response:
                    if response.status == 200:
                        return await self._text(response)
            self.resent += 1
            await asyncio.sleep(0.1)

    async def _text(self, response: aiohttp.ClientResponse) -> str | None:
        if response.content_type == "multipart/form-data":
            async for part in aiohttp.MultipartReader.from_response(response):
                if isinstance(part, aiohttp.BodyPartReader) and part.name == "text":
                    return await part.text()
        return None


@dataclass
class Verdict:
    """What the booked steps tell."""

    lost: int
    """Updates of which no step is booked."""
    doubled: int
    """Steps that have the number of another one of the same user."""
    overlapping: int
    """Steps that began before the same user's last one had ended."""
    out_of_order: int
    """Steps that answer another question than it was the turn of."""
    shared: int
    """Users of whose steps some were made by one worker and some by the other."""


def judge(session: Session, updates: Iterable[dict[str, Any]]) -> Verdict:
    """Look at the steps that should be there."""
    ids = {update["update_id"] for update in updates}
    found = select(Step).where(Step.update_id.in_(ids)).order_by(Step.user_id, Step.began)
    steps = session.scalars(found).all()
    return Verdict(
        lost=len(ids) - len(steps),
        doubled=len(steps) - len({(step.user_id, step.number) for step in steps}),
        overlapping=sum(
            one.user_id == next_one.user_id and next_one.began < one.ended
            for one, next_one in itertools.pairwise(steps)
        ),
        out_of_order=sum(step.question != QUESTIONS[(step.number - 1) % 3] for step in steps),
        shared=sum(
            len({step.worker for step in of_user}) > 1
            for _, of_user in itertools.groupby(steps, lambda step: step.user_id)
        ),
    )


async def main() -> None:
    """Post updates at once to two workers, and say what has become of them."""
    parser = argparse.ArgumentParser("python -m webhook_workers")
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--updates", type=int, default=25, help="of each user")
    parser.add_argument("--without-isolation", action="store_true")
    options = parser.parse_args()
    isolation = "off" if options.without_isolation else "on"

    Base.metadata.create_all(engine)
    todo = updates(options.users, options.updates)
    with workers(2, ISOLATION=isolation) as urls:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:
            telegram = Telegram(client, urls)
            began = time.monotonic()
            await asyncio.gather(*[telegram.post(update) for update in todo])
            seconds = time.monotonic() - began
    with SessionLocal() as session:
        verdict = judge(session, todo)
    engine.dispose()
    print(
        f"{len(todo)} updates of {options.users} users at once, {seconds:.1f} s; both workers had "
        f"updates of {verdict.shared} users; {telegram.resent} sent again"
    )
    print(
        f"isolation {isolation}: {verdict.lost} lost, {verdict.doubled} doubled, "
        f"{verdict.overlapping} overlapping, {verdict.out_of_order} out of order"
    )


if __name__ == "__main__":
    # The workers end with whoever started them.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    asyncio.run(main())
