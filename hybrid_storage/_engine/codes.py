"""The table of answers that pass by themselves, whichever server, pooler or proxy gives them.

PostgreSQL and what speaks its protocol answer with an SQLSTATE, MySQL and what speaks its protocol
with a number. A few of either say too little: there the text tells. ``errors.py`` reads them.

Each part of the table stands twice: what tests have provoked on a real server, and what is taken
from the documents of an engine that there is no server of here. ``tests/test_transient_errors.py``
and ``tests/test_failovers.py`` provoke the first, ``tests/test_documented_errors.py``
shows the second to each driver.

Some answers leave open whether a write has happened, as a connection does that is lost before the
answer: 40003, 1180, 2013. They need no part of their own. Every call of the storage may be made
again after it has been carried out, and a unit of work looks at its lock first.
"""

from __future__ import annotations

import re

# A pooler sent the statement to a server that has not prepared it, or that has already.
MISPLACED_STATEMENT: frozenset[str] = frozenset({"26000", "42P05"})  # provoked: PgBouncer

TRANSIENT_CLASSES: frozenset[str] = frozenset(
    {
        "08",  # connection exceptions. Provoked: PgBouncer says 08P01 for all that ails it
        # Transaction rollback. Provoked: 40001 and 40P01, serialization failure and deadlock.
        # From documents: 40001 of a standby whose primary removes what a query reads (PostgreSQL),
        # "restart transaction" (CockroachDB), conflicts and read restarts (YugabyteDB), OC000 and
        # OC001 (Aurora DSQL); 40003, the result is ambiguous (CockroachDB).
        "40",
        "53",  # insufficient resources. Provoked: 53300, too many connections
        "OC",  # Aurora DSQL, where a client shows the code of the conflict as the SQLSTATE
    }
)
PROVOKED_STATES: frozenset[str] = frozenset(
    {
        "25006",  # read only: a standby, or the old primary in a failover
        "25P03",  # the transaction has idled for too long, and the connection is closed
        "55P03",  # lock_timeout
        "57P01",  # the server is shut down, or this connection is
        "57P03",  # the server starts up, stops, or is a standby that takes no connections
        "57P05",  # the connection has idled for too long, and is closed
    }
)
DOCUMENTED_STATES: frozenset[str] = frozenset(
    {
        "25P04",  # PostgreSQL 17: the transaction took too long, and the connection is closed
        "57P02",  # PostgreSQL: another process has crashed, and all connections are closed
        "58C00",  # CockroachDB: a range has no leaseholder, as when replicas are lost
        "58C01",  # CockroachDB: a node does not reach another
        "72000",  # PostgreSQL up to 16: the snapshot is too old; the next attempt has a new one
    }
)
TRANSIENT_STATES: frozenset[str] = MISPLACED_STATEMENT | PROVOKED_STATES | DOCUMENTED_STATES

TRANSIENT_TEXTS_OF_STATES: dict[str, re.Pattern[str]] = {
    # PgCat, from its source: no server of the pool answers, or none is free.
    "58000": re.compile(r"could not get connection from the pool|all servers down", re.IGNORECASE),
    "XX000": re.compile(
        # YugabyteDB, from its documents and issues: where it has no code for what passes.
        r"restart read required|schema version mismatch|not the leader|leader not ready"
        r"|could be recently aborted|expired or aborted by a conflict|passed its deadline"
        # Supavisor, from its documents: no client, or no connection, more.
        r"|ECHECKOUTTIMEOUT|EMAXCONN|max clients reached|max client connections reached"
        r"|unable to check ?out",
        re.IGNORECASE,
    ),
}
# PgBouncer has one code for everything. Provoked: these are settings that are wrong. (From its
# source: what it requires.)
_SETTINGS_OF_PGBOUNCER = re.compile(
    r"unsupported startup parameter|no such (user|database)|authentication failed|login rejected"
    r"|(SSL|TLS connection|certificate) required|statement pooling mode"
)
LASTING_TEXTS_OF_STATES: dict[str, re.Pattern[str]] = {
    # Without a state: of psycopg 3.1 and the first 3.2, for what came before the hang-up.
    "": re.compile("statement pooling mode"),
    "08P01": _SETTINGS_OF_PGBOUNCER,
    "08003": _SETTINGS_OF_PGBOUNCER,  # of asyncpg, which repeats what came before the hang-up
}

PROVOKED_IN_MYSQL: frozenset[int] = frozenset(
    {
        1020,  # the record has changed since it was read
        1040,  # too many connections
        1047,  # Galera: this node is not ready, or not part of the cluster
        1203,  # too many connections of this user; Vitess, from its source: a pool is exhausted
        1205,  # lock wait timeout
        1213,  # deadlock; Galera: a conflict with another node's write, found at the commit
        1226,  # too much of what this user may have: connections, or statements an hour
        1927,  # the connection was killed
    }
)
DOCUMENTED_IN_MYSQL: frozenset[int] = frozenset(
    {
        1041,  # Vitess: transactions are throttled
        1053,  # MySQL, MariaDB: the server shuts down
        1180,  # Galera: the commit failed, as when the node loses its cluster. It may have happened
        1637,  # MySQL: too many transactions at a time
        1836,  # MySQL, Aurora: read only
        1874,  # MySQL, Vitess: InnoDB is read only
        3032,  # MySQL: the server is in offline mode
        3101,  # MySQL: group replication rolled the transaction back
        3168,  # Vitess: the server is not available
        3169,  # MySQL: the session was killed
        4031,  # MySQL: the connection has idled for too long, and is closed
        8002,  # TiDB: a conflict with another transaction's SELECT FOR UPDATE
        8005,  # TiDB: a write conflict
        8022,  # TiDB: the commit failed and is rolled back
        8027,  # TiDB: this node's copy of the schema is out of date
        8028,  # TiDB: the schema has changed under the transaction
        8229,  # TiDB: the transaction took too long
        8252,  # TiDB: the resource group has used up what it may use
        # PD, TiKV and TiFlash: time-outs, too busy, no leader. ProxySQL has three of the numbers:
        # no server answered in time (9001, 9002), the server went offline (9004).
        *(9001, 9002, 9003, 9004, 9005, 9008, 9010, 9012, 9013),
        9007,  # TiDB: a write conflict
    }
)
TRANSIENT_IN_MYSQL: frozenset[int] = PROVOKED_IN_MYSQL | DOCUMENTED_IN_MYSQL
CLIENT_ERRORS_OF_MYSQL = range(2000, 3000)  # the server could not be reached, or went away

# Vitess and PlanetScale, from their documents and source.
_OF_VITESS = re.compile(
    r"not serving|failing over|connection pool|code = (Unavailable|Aborted|ResourceExhausted)",
    re.IGNORECASE,
)
TRANSIENT_TEXTS_IN_MYSQL: dict[int, re.Pattern[str]] = {
    # An option prevents it. Provoked: the one of a replica, or of the old primary in a failover.
    1290: re.compile(r"read.only", re.IGNORECASE),
    # Whatever went wrong. TiDB, from its documents: what TiKV answers without a number.
    1105: re.compile(
        rf"{_OF_VITESS.pattern}|vttablet|region is unavailable|server is busy|tikv.*time-?out",
        re.IGNORECASE,
    ),
    # TiDB: the snapshot is too old; the next attempt has a new one. ProxySQL: a wrong setting.
    9006: re.compile(r"GC life time", re.IGNORECASE),
    # The statement was interrupted: by Vitess, which ends it in a failover, or by somebody's KILL.
    1317: _OF_VITESS,
}

# The server takes no writes, but keeps its connections: another one has to be found.
OF_THE_WRONG_SERVER: frozenset[str | int | None] = frozenset({"25006", 1047, 1290, 1836, 1874})

# Of no code at all: a driver that has tried all hosts, and found none of the wanted kind.
# Provoked: asyncpg with target_session_attrs. (psycopg's error is one of connecting.)
NO_SUCH_HOST_YET = re.compile(r"hosts match the target attribute")
