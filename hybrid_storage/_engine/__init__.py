"""How a function gets to the database: sessions, threads, slots, cancellation and retries.

Private to the package. Nothing in here knows aiogram or the tables; nothing in here imports from
the rest of the package. Read ``runner.py`` first.
"""
