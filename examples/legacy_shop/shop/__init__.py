"""The shop as it was before the bot: Flask, synchronous SQLAlchemy, one global session."""
