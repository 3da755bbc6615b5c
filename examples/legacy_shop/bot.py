"""The shop's bot: a form for the order, and a payment by gift card."""

from __future__ import annotations

from aiogram import Bot, Dispatcher, F
from aiogram.client.session.aiohttp import AiohttpSession
from aiogram.client.telegram import TelegramAPIServer
from aiogram.filters import Command
from aiogram.fsm.context import FSMContext
from aiogram.fsm.state import State, StatesGroup
from aiogram.types import Message

from hybrid_storage import FlushMiddleware

from .shop.orders import PaymentRefused, money, pay, place_order, price_list, total
from .storage import BOT_TOKEN, call, isolation, storage

dp = Dispatcher(storage=storage, events_isolation=isolation)
dp.startup.register(storage.create_table)


class Checkout(StatesGroup):
    product = State()
    quantity = State()
    address = State()
    payment = State()
    paid = State()


@dp.message(Command("start"))
async def start(message: Message, state: FSMContext) -> None:
    goods = await call(price_list)
    await state.set_data({})
    await state.set_state(Checkout.product)
    lines = "; ".join(f"{number}: {line}" for number, line in goods.items())
    await message.answer(f"We have {lines}. Which number?")


@dp.message(Checkout.product, F.text.as_("text"))
async def take_product(message: Message, state: FSMContext, text: str) -> None:
    if text not in map(str, await call(price_list)):
        await message.answer("Please send a number of the list.")
        return
    await state.update_data(product=int(text))
    await state.set_state(Checkout.quantity)
    await message.answer("How many?")


@dp.message(Checkout.quantity, F.text.as_("text"))
async def take_quantity(message: Message, state: FSMContext, text: str) -> None:
    if not text.isdecimal() or not 1 <= int(text) <= 99:
        await message.answer("Please send a number from 1 to 99.")
        return
    await state.update_data(quantity=int(text))
    await state.set_state(Checkout.address)
    await message.answer("Where do we send it?")


@dp.message(Checkout.address, F.text.as_("address"))
async def take_address(message: Message, state: FSMContext, address: str) -> None:
    form = await state.update_data(address=address)
    await state.set_state(Checkout.payment)
    cents = await call(total, form["product"], form["quantity"])
    await message.answer(f"That makes {money(cents)}. The code of your gift card?")


@dp.message(Checkout.payment, F.text.as_("card"))
async def take_payment(message: Message, state: FSMContext, card: str) -> None:
    try:
        async with storage.transaction():
            form = await state.get_data()
            order = await call(place_order, form["product"], form["quantity"], form["address"])
            await call(pay, order, card)
            await state.set_state(Checkout.paid)
            await state.set_data({"order": order})
    except PaymentRefused as refusal:
        await message.answer(f"{refusal} Nothing was ordered. Another card?")
    else:
        await message.answer(f"Order {order} is paid. Thank you!")


@dp.message(Checkout.paid)
async def remember(message: Message, state: FSMContext) -> None:
    order = await state.get_value("order")
    await message.answer(f"Order {order} is paid and on its way. /start begins another.")


@dp.message()
async def explain(message: Message) -> None:
    await message.answer("/start begins an order.")


async def poll(api_url: str, *, handle_signals: bool = True) -> None:
    """Run the bot until it is stopped.

    :param api_url: a Bot API server
    :param handle_signals: whether SIGINT and SIGTERM stop it; False outside of the main thread
    """
    bot = Bot(BOT_TOKEN, session=AiohttpSession(api=TelegramAPIServer.from_base(api_url)))
    # No user gets a question whose state is not in the database.
    bot.session.middleware(FlushMiddleware(storage))
    # Not as tasks: an update is then confirmed only after its transaction has ended, and comes
    # again if the process dies before. One whose payment was committed then finds Checkout.paid.
    await dp.start_polling(bot, handle_as_tasks=False, handle_signals=handle_signals)
