"""What is said to the database: plain functions of a SQLAlchemy ``Connection``.

Private to the package. Nothing in here waits in an event loop, commits, or chooses a connection:
the same functions serve worker threads, greenlets, and sessions of the application. Read
``rows.py`` first.
"""
