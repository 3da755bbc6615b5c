"""Which errors pass by themselves, of engines that there is no server of here: from documents.

Nothing in here has been provoked. Each line is what an engine's own documents, or its source, say
that it answers; each driver gets it in the form that the driver gives to errors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import asyncmy.errors
import asyncpg
import mysql.connector
import pg8000.exceptions
import psycopg
import psycopg2
import psycopg2.errors
import pymysql
import pytest
from sqlalchemy.exc import DBAPIError

from hybrid_storage._engine.codes import (
    DOCUMENTED_IN_MYSQL,
    DOCUMENTED_STATES,
    TRANSIENT_TEXTS_OF_STATES,
)
from hybrid_storage._engine.errors import is_serialization_failure, is_transient


class Answer(NamedTuple):
    """What an engine answers, by its documents."""

    engine: str
    code: Any
    text: str
    source: str
    """Where that is said."""


POSTGRESQL = "PostgreSQL, appendix A"
COCKROACHDB = "cockroachlabs.com/docs/stable"
COCKROACHDB_SOURCE = "cockroachdb/cockroach, pkg/sql/pgwire/pgcode/codes.go"
YUGABYTEDB = "docs.yugabyte.com, transactions-errorcodes-ysql"
YUGABYTEDB_ISSUES = "yugabyte/yugabyte-db, issues"
DSQL = "Aurora DSQL user guide, working-with-concurrency-control"
SUPAVISOR = "supabase/supavisor"
MYSQL = "MySQL 8.0, error message reference"
GALERA = "MariaDB/server, sql/wsrep_mysqld.h"
TIDB = "docs.pingcap.com, error-codes"
PROXYSQL = "proxysql.com/documentation/error-codes"
VITESS = "vitessio/vitess, go/mysql/sqlerror/sql_error.go"
PLANETSCALE = "planetscale.com/docs, troubleshooting/errors"

OF_POSTGRESQL = [
    Answer("PostgreSQL", "25P04", "terminating connection due to transaction timeout", POSTGRESQL),
    Answer("PostgreSQL", "57P02", "terminating connection because of crash", POSTGRESQL),
    Answer("PostgreSQL", "72000", "snapshot too old", POSTGRESQL),
    Answer("PostgreSQL", "40001", "canceling statement due to conflict with recovery", POSTGRESQL),
    Answer("PostgreSQL", "40P01", "canceling statement due to conflict with recovery", POSTGRESQL),
    Answer(
        "CockroachDB",
        "40001",
        "restart transaction: TransactionRetryWithProtoRefreshError: WriteTooOldError",
        f"{COCKROACHDB}/transaction-retry-error-reference",
    ),
    Answer("CockroachDB", "40003", "result is ambiguous", f"{COCKROACHDB}/common-errors"),
    Answer("CockroachDB", "57P01", "server is shutting down", f"{COCKROACHDB}/node-shutdown"),
    Answer("CockroachDB", "58C00", "replica unavailable", COCKROACHDB_SOURCE),
    Answer("CockroachDB", "58C01", "connection to a node failed", COCKROACHDB_SOURCE),
    Answer("YugabyteDB", "40001", "could not serialize access", YUGABYTEDB),
    Answer("YugabyteDB", "40P01", "deadlock detected", YUGABYTEDB),
    Answer("YugabyteDB", "XX000", "Query error: Restart read required at: { }", YUGABYTEDB_ISSUES),
    Answer("YugabyteDB", "XX000", "schema version mismatch for table", YUGABYTEDB_ISSUES),
    Answer("YugabyteDB", "XX000", "Illegal state: Not the leader", YUGABYTEDB_ISSUES),
    Answer("YugabyteDB", "XX000", "Leader not ready to serve requests", YUGABYTEDB_ISSUES),
    Answer("YugabyteDB", "XX000", "Read(tablet: f2) passed its deadline 411s", YUGABYTEDB_ISSUES),
    Answer("Aurora DSQL", "40001", "change conflicts with another transaction (OC000)", DSQL),
    Answer("Aurora DSQL", "40001", "schema has been updated by another (OC001)", DSQL),
    Answer("Aurora DSQL", "OC000", "change conflicts with another transaction", DSQL),
    Answer("Aurora DSQL", "OC001", "schema has been updated by another", DSQL),
    Answer("Supavisor", "XX000", "Max client connections reached", SUPAVISOR),
    Answer("Supavisor", "XX000", "(ECHECKOUTTIMEOUT) unable to check out connection", SUPAVISOR),
    Answer(
        "PgCat",
        "58000",
        "could not get connection from the pool - AllServersDown",
        "postgresml/pgcat, issue 824",
    ),
]
LASTING_OF_POSTGRESQL = [
    Answer("any", "XX000", "cache lookup failed for type 1", POSTGRESQL),
    Answer("any", "57P04", "terminating connection: the database was dropped", POSTGRESQL),
    Answer("any", "57014", "canceling statement due to user request", POSTGRESQL),
    Answer("any", "58000", "could not read a file", POSTGRESQL),
    Answer("CockroachDB", "0A000", "multiple modification subqueries", COCKROACHDB),
    Answer("Aurora DSQL", "0A000", "unsupported statement: Savepoint", DSQL),
]

OF_MYSQL = [
    Answer("MySQL", 1053, "Server shutdown in progress", MYSQL),
    Answer("MySQL", 1637, "Too many active concurrent transactions", MYSQL),
    Answer("MySQL", 3032, "The server is currently in offline mode", MYSQL),
    Answer("MySQL", 3101, "Plugin instructed the server to rollback the transaction", MYSQL),
    Answer("MySQL", 3169, "Session was killed", MYSQL),
    Answer("MySQL", 4031, "The client was disconnected because of inactivity", MYSQL),
    Answer("Aurora", 1290, "running with the --read-only option", "repost.aws, knowledge center"),
    Answer("MySQL", 1290, "running with the --super-read-only option", MYSQL),
    Answer("Aurora", 1836, "Running in read-only mode", MYSQL),
    Answer("Galera", 1180, "Got error 6 during COMMIT", GALERA),
    Answer("TiDB", 8002, "can not retry select for update statement", TIDB),
    Answer("TiDB", 8005, "Write Conflict, txnStartTS is stale", TIDB),
    Answer("TiDB", 8022, "Error: KV error safe to retry", TIDB),
    Answer("TiDB", 8027, "Information schema is out of date", TIDB),
    Answer("TiDB", 8028, "Information schema is changed", TIDB),
    Answer("TiDB", 8229, "transaction exceeds its survival time", TIDB),
    Answer("TiDB", 8252, "Exceeded resource group quota limitation", TIDB),
    Answer("TiDB", 9001, "PD Server Timeout", TIDB),
    Answer("TiDB", 9002, "TiKV Server Timeout", TIDB),
    Answer("TiDB", 9003, "TiKV Server is Busy", TIDB),
    Answer("TiDB", 9004, "Resolve Lock Timeout", TIDB),
    Answer("TiDB", 9005, "Region is unavailable", TIDB),
    Answer("TiDB", 9006, "GC life time is shorter than transaction duration", TIDB),
    Answer("TiDB", 9007, "Write conflict", TIDB),
    Answer("TiDB", 9008, "too many requests to TiKV", TIDB),
    Answer("TiDB", 9010, "TiKV cannot process this raft log", TIDB),
    Answer("TiDB", 9012, "TiFlash Server Timeout", TIDB),
    Answer("TiDB", 9013, "TiFlash Server is Busy", TIDB),
    Answer("TiDB", 1105, "Region is unavailable", TIDB),
    Answer("ProxySQL", 9001, "Max connect timeout reached while reaching hostgroup", PROXYSQL),
    Answer("ProxySQL", 9002, "Max connect failure while reaching hostgroup", PROXYSQL),
    Answer("ProxySQL", 9004, "Backend Offline Detected", PROXYSQL),
    Answer("Vitess", 1041, "Transaction throttled", VITESS),
    Answer("Vitess", 1203, "vttablet: rpc error: code = ResourceExhausted", VITESS),
    Answer("Vitess", 1317, "vttablet: rpc error: code = Aborted desc = transaction 1", VITESS),
    Answer("Vitess", 1874, "InnoDB is in read only mode", VITESS),
    Answer("Vitess", 3168, "Server isn't available", VITESS),
    Answer("Vitess", 1105, "target: t.-.primary: primary is not serving", VITESS),
    Answer("PlanetScale", 1105, "vttablet: rpc error: code = Unavailable", PLANETSCALE),
]
LASTING_OF_MYSQL = [
    Answer("MySQL", 1317, "Query execution was interrupted", MYSQL),
    Answer("MySQL", 1290, "running with the --secure-file-priv option", MYSQL),
    Answer("Galera", 1105, "Maximum writeset size exceeded", GALERA),
    Answer("TiDB", 8004, "transaction too large", TIDB),
    Answer("ProxySQL", 9006, "connection is locked to hostgroup 0", PROXYSQL),
    Answer("Vitess", 1235, "VT12001: unsupported: a statement", VITESS),
]


def of_psycopg2(code: Any, text: str) -> Exception:
    error: Exception
    error = psycopg2.errors.lookup(code)(text) if known(code) else psycopg2.InternalError(text)
    error.__setstate__({"pgcode": code, "pgerror": text})
    return error


def known(code: str) -> bool:
    try:
        psycopg2.errors.lookup(code)
    except KeyError:
        return False
    return True


def of_psycopg(code: Any, text: str) -> Exception:
    try:
        return psycopg.errors.lookup(code)(text)
    except KeyError:
        error = psycopg.InternalError(text)
        error.sqlstate = code
        return error


POSTGRESQL_DRIVERS: dict[str, Callable[[Any, str], Exception]] = {
    "psycopg": of_psycopg,
    "asyncpg": lambda code, text: asyncpg.PostgresError.new({"C": code, "M": text}),
    "psycopg2": of_psycopg2,
    "pg8000": lambda code, text: pg8000.exceptions.DatabaseError({"C": code, "M": text}),
}
MYSQL_DRIVERS: dict[str, Callable[[Any, str], Exception]] = {
    "pymysql": pymysql.err.OperationalError,
    "asyncmy": asyncmy.errors.OperationalError,
    "mysqlconnector": lambda code, text: mysql.connector.DatabaseError(msg=text, errno=code),
}


def name_of(answer: object) -> str:
    return f"{answer.engine}-{answer.code}" if isinstance(answer, Answer) else str(answer)


def of_driver(
    drivers: dict[str, Callable[[Any, str], Exception]], driver: str, answer: Answer
) -> DBAPIError:
    return DBAPIError("SELECT 1", {}, drivers[driver](answer.code, answer.text))


@pytest.mark.parametrize("driver", POSTGRESQL_DRIVERS)
@pytest.mark.parametrize("answer", OF_POSTGRESQL, ids=name_of)
def test_what_passes_by_the_documents_is_transient(answer: Answer, driver: str) -> None:
    assert is_transient(of_driver(POSTGRESQL_DRIVERS, driver, answer))


@pytest.mark.parametrize("driver", POSTGRESQL_DRIVERS)
@pytest.mark.parametrize("answer", LASTING_OF_POSTGRESQL, ids=name_of)
def test_what_lasts_by_the_documents_is_not_transient(answer: Answer, driver: str) -> None:
    assert not is_transient(of_driver(POSTGRESQL_DRIVERS, driver, answer))


@pytest.mark.parametrize("driver", MYSQL_DRIVERS)
@pytest.mark.parametrize("answer", OF_MYSQL, ids=name_of)
def test_what_passes_by_mysqls_and_its_kins_documents_is_transient(
    answer: Answer, driver: str
) -> None:
    assert is_transient(of_driver(MYSQL_DRIVERS, driver, answer))


@pytest.mark.parametrize("driver", MYSQL_DRIVERS)
@pytest.mark.parametrize("answer", LASTING_OF_MYSQL, ids=name_of)
def test_what_lasts_by_mysqls_and_its_kins_documents_is_not_transient(
    answer: Answer, driver: str
) -> None:
    assert not is_transient(of_driver(MYSQL_DRIVERS, driver, answer))


@pytest.mark.parametrize("driver", POSTGRESQL_DRIVERS)
@pytest.mark.parametrize("code", ["40001", "OC000", "OC001"])
def test_a_conflict_of_transactions_is_one_in_aurora_dsql_too(code: str, driver: str) -> None:
    """A lock whose taking conflicts is asked for again, without a warning."""
    answer = Answer("Aurora DSQL", code, "change conflicts with another transaction", DSQL)
    assert is_serialization_failure(of_driver(POSTGRESQL_DRIVERS, driver, answer))


@pytest.mark.parametrize("driver", POSTGRESQL_DRIVERS)
def test_an_ambiguous_result_is_not_taken_for_a_conflict(driver: str) -> None:
    """It may have been written: it is a lost answer, and a unit of work looks at its lock first."""
    answer = Answer("CockroachDB", "40003", "result is ambiguous", COCKROACHDB)
    assert not is_serialization_failure(of_driver(POSTGRESQL_DRIVERS, driver, answer))


def test_each_line_of_the_table_that_is_from_documents_is_shown_here() -> None:
    states = {answer.code for answer in OF_POSTGRESQL}
    assert states >= DOCUMENTED_STATES | TRANSIENT_TEXTS_OF_STATES.keys()
    assert {answer.code for answer in OF_MYSQL} >= DOCUMENTED_IN_MYSQL
