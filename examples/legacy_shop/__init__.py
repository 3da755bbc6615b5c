"""An old shop, and the Telegram bot that it got."""
