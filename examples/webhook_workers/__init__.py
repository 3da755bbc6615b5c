"""A bot on webhooks, in two processes on one database."""
