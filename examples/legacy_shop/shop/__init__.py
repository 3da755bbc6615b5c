"""The shop as it was before the bot: Flask and synchronous SQLAlchemy."""
