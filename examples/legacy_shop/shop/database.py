"""The shop's one engine, and the session that all of its functions use."""

import os

from sqlalchemy import create_engine
from sqlalchemy.orm import declarative_base, scoped_session, sessionmaker

engine = create_engine(os.getenv("DATABASE_URL", "sqlite:///legacy_shop.db"))
Session = scoped_session(sessionmaker(bind=engine))
Base = declarative_base()
