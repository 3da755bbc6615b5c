"""Whether what the storage sends is within the SQL of engines that there is no server of here.

Every statement is taken from a server of the same protocol, parsed, and held against a table of
what an engine's documents say that it takes. Nothing in here proves that an engine works.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import sqlglot
from backends import MARIADB, POSTGRESQL, Backend
from said import Said, everything_said
from sqlalchemy import URL
from sqlglot import expressions as exp

WORKS = ["calls", "find(), count(), changes"]
IN_TRANSACTIONS = ["transaction()", "transaction() in a task of another"]
ISOLATED = ["unit of work", "lease", "unit of work with a lease"]
EVERYTHING = ["create_table()", *WORKS, *IN_TRANSACTIONS, *ISOLATED, "rename, move", "migrate()"]

# What is in every SQL: the parser's names of it.
_CORE = """
add alias and between boolean cast coalesce column columnconstraint columndef concat count create
cte datatype datatypeparam delete div dot dpipe eq escape exists extract from group gt gte
identifier if in index indexparameters insert is join like limit literal lt lte max min mul neg neq
not notnullcolumnconstraint null or order ordered paren placeholder primarykey schema select set
setitem star sub subquery substring table tablealias tuple update values var where
"""
CORE = set(_CORE.split())


@dataclass(frozen=True)
class Engine:
    """What an engine takes beyond that, and which document says so."""

    takes: Mapping[str, str]
    """By construct."""
    lacks: Mapping[str, tuple[str, list[str]]] = field(default_factory=dict)
    """By construct: the document, and what of the storage does not work therefore."""
    kin: Mapping[str, Any] = field(default_factory=dict)
    """How its dialect differs from that of the server it is taken for."""


def all_of(source: str, *constructs: str) -> dict[str, str]:
    return dict.fromkeys(constructs, source)


SAVEPOINTS = ["SAVEPOINT", "RELEASE SAVEPOINT", "ROLLBACK TO SAVEPOINT"]
OF_POSTGRESQL = [
    *("WITH", "a write in WITH", "RETURNING"),
    *("ON CONFLICT DO UPDATE", "ON CONFLICT DO UPDATE WHERE", "ON CONFLICT DO NOTHING"),
    *("FOR UPDATE", "FOR UPDATE of several rows", "SKIP LOCKED"),
    *("IS NOT DISTINCT FROM", "ANY(array)", "comparison of rows"),
    *("clock_timestamp()", "SET LOCAL lock_timeout", "CREATE INDEX", *SAVEPOINTS),
    *(
        "type BIGINT",
        "type DOUBLE",
        "type TEXT",
        "type VARCHAR",
        "type ARRAY",
        "type BOOLEAN",
        "type INT",
    ),
]
OF_MYSQL = [
    *("ON DUPLICATE KEY UPDATE", "VALUES()", "INSERT IGNORE", "FORCE INDEX"),
    *("FOR UPDATE", "FOR UPDATE of several rows", "comparison of rows"),
    *("timestampdiff()", "utc_timestamp(6)", "a system variable"),
    *("SET SESSION innodb_lock_wait_timeout", "CREATE INDEX", "index of a prefix", *SAVEPOINTS),
    *("CHARACTER SET", "COLLATE", "type BIGINT", "type DOUBLE", "type LONGTEXT", "type VARCHAR"),
    "type BINARY",
]
IN_ONE = ["unnest() of several arrays", "FOR UPDATE OF", "FOR UPDATE in WITH"]

COCKROACHDB = "cockroachlabs.com/docs/stable"
YUGABYTEDB = "docs.yugabyte.com/stable"
DSQL = "docs.aws.amazon.com/aurora-dsql/latest/userguide"
TIDB = "docs.pingcap.com/tidb/stable"
VITESS = "vitess.io/docs"

ENGINES: dict[str, Engine] = {
    "CockroachDB": Engine(
        {
            **all_of(f"{COCKROACHDB}/sql-feature-support", *OF_POSTGRESQL),
            **all_of(f"{COCKROACHDB}/select-for-update", "FOR UPDATE", "FOR UPDATE in WITH"),
            "SKIP LOCKED": "cockroachdb/docs issue 14770: since 22.2",
        },
        {
            # Not sent: its dialect has a name of its own.
            "several writes to one table": (f"{COCKROACHDB}/known-limitations", []),
        },
        {"name": "cockroachdb"},
    ),
    "YugabyteDB": Engine(
        {
            **all_of(f"{YUGABYTEDB}/api/ysql: PostgreSQL's own parser", *OF_POSTGRESQL, *IN_ONE),
            **all_of(f"{YUGABYTEDB}/explore/transactions/explicit-locking", "SKIP LOCKED"),
            "several writes to one table": f"{YUGABYTEDB}/api/ysql: PostgreSQL's own planner",
            "pg_backend_pid()": f"{YUGABYTEDB}/api/ysql: PostgreSQL's own functions",
        },
    ),
    "Aurora DSQL": Engine(
        all_of(
            f"{DSQL}/working-with: PostgreSQL's own parser and planner, deviations are named",
            *(each for each in OF_POSTGRESQL if each not in SAVEPOINTS),
        ),
        {
            **dict.fromkeys(
                SAVEPOINTS,
                (
                    f"{DSQL}/working-with-postgresql-compatibility-unsupported-features",
                    [*IN_TRANSACTIONS, *ISOLATED, "rename, move", "migrate()"],
                ),
            ),
            "CREATE INDEX": (
                f"{DSQL}/working-with-create-index-async: ASYNC only",
                ["create_table()", "migrate()"],
            ),
            "SKIP LOCKED": ("not in its list of supported SQL", ["lease", ISOLATED[2]]),
            "FOR UPDATE in WITH": ("not in its list of supported SQL", ["lease", ISOLATED[2]]),
            "SET LOCAL lock_timeout": ("not in its list of supported SQL", IN_TRANSACTIONS),
        },
        {"name": "auroradsql"},
    ),
    "TiDB": Engine(
        all_of(f"{TIDB}/mysql-compatibility; SHOW BUILTINS", *OF_MYSQL)
        | all_of(f"{TIDB}/sql-statement-savepoint: since 6.2", *SAVEPOINTS)
        | {"LAST_INSERT_ID(expr)": f"{TIDB}/information-functions"},
        {
            "SKIP LOCKED": (
                "pingcap/tidb issue 18207: read, and ignored",
                ["lease", "unit of work with a lease"],
            )
        },
        {
            **{"is_mariadb": False, "insert_returning": False, "delete_returning": False},
            "server_version_info": (8, 0, 11),
        },
    ),
    "Vitess": Engine(
        all_of(f"{VITESS}/reference/compatibility/mysql-compatibility", *OF_MYSQL)
        | {
            "SKIP LOCKED": "release notes of Vitess 19",
            "SET SESSION innodb_lock_wait_timeout": "vitessio/vitess pull request 16574",
        },
        {
            "LAST_INSERT_ID(expr)": (
                "vitessio/vitess pull request 17295: in a SELECT only",
                [each for each in EVERYTHING if each != "create_table()"],
            )
        },
        {
            **{"is_mariadb": False, "insert_returning": False, "delete_returning": False},
            "server_version_info": (8, 0, 11),
        },
    ),
}
PROTOCOLS = {"TiDB": MARIADB[:1], "Vitess": MARIADB[:1]}
CASES = [
    (engine, backend) for engine in ENGINES for backend in PROTOCOLS.get(engine, POSTGRESQL[:1])
]


def parsed(statement: str, backend: Backend) -> exp.Expr | None:
    """Return a statement's tree; None for those on savepoints, which the parser does not know."""
    text = re.sub(r"%\((\w+)\)s", r":\1", statement).replace("%%", "%")
    if "SAVEPOINT" in text:
        return None
    dialect = "postgres" if backend.server == "postgresql" else "mysql"
    tree = sqlglot.parse_one(text, dialect=dialect)
    assert isinstance(tree, exp.Expr)
    return tree


def constructs(statement: str, backend: Backend) -> set[str]:
    """Return what a statement is made of."""
    tree = parsed(statement, backend)
    if tree is None:
        return {" ".join(statement.split()[:-1])}
    return set().union(*(names_of(node) for node in tree.walk())) | set(whole(tree))


def names_of(node: exp.Expr) -> Iterator[str]:
    """Yield what a node stands for."""
    if isinstance(node, exp.Anonymous):
        name = node.name.upper()
        yield {"LAST_INSERT_ID": "LAST_INSERT_ID(expr)", "STATE": "index of a prefix"}.get(
            name, f"{name if name == 'VALUES' else name.lower()}()"
        )
    elif isinstance(node, exp.DataType):
        yield f"type {node.this.name}"
        if node.this is exp.DataType.Type.ARRAY:
            yield "type ARRAY"
    elif isinstance(node, exp.OnConflict):
        yield from names_of_conflict(node)
    elif isinstance(node, exp.Lock):
        yield "FOR UPDATE" if node.args.get("update") else "FOR SHARE"
        if node.args.get("wait") is False:
            yield "SKIP LOCKED"
        if node.expressions:
            yield "FOR UPDATE OF"
        if node.find_ancestor(exp.CTE):
            yield "FOR UPDATE in WITH"
        where = node.parent.find(exp.Where) if node.parent else None
        if where is None or where.find(exp.In):
            yield "FOR UPDATE of several rows"
    elif isinstance(node, exp.Unnest):
        yield "unnest() of several arrays"
    elif isinstance(node, exp.GT) and isinstance(node.this, exp.Tuple):
        yield "comparison of rows"
    elif isinstance(node, exp.CTE) and isinstance(node.this, WRITES):
        yield "a write in WITH"
    elif isinstance(node, exp.Insert) and node.args.get("ignore"):
        yield "INSERT IGNORE"
    elif isinstance(node, exp.Create) and node.kind == "INDEX":
        yield "CREATE INDEX"
    elif isinstance(node, exp.Set):
        yield re.sub(r" = .*| TO .*", "", node.sql())
    else:
        yield NAMES.get(node.key, node.key)


WRITES = (exp.Insert, exp.Update, exp.Delete)
NAMES = {
    "any": "ANY(array)",
    "charactersetcolumnconstraint": "CHARACTER SET",
    "collatecolumnconstraint": "COLLATE",
    "indextablehint": "FORCE INDEX",
    "nullsafeeq": "IS NOT DISTINCT FROM",
    "returning": "RETURNING",
    "sessionparameter": "a system variable",
    "timestampdiff": "timestampdiff()",
    "utctimestamp": "utc_timestamp(6)",
    "with": "WITH",
}


def names_of_conflict(node: exp.OnConflict) -> Iterator[str]:
    if node.args.get("duplicate"):
        yield "ON DUPLICATE KEY UPDATE"
    elif not node.expressions:
        yield "ON CONFLICT DO NOTHING"
    else:
        yield "ON CONFLICT DO UPDATE WHERE" if node.args.get("where") else "ON CONFLICT DO UPDATE"


def whole(tree: exp.Expr) -> Iterator[str]:
    """Yield what the parts of a statement are only together."""
    written = [node.find(exp.Table) for node in tree.find_all(*WRITES)]
    names = [table.name for table in written if table is not None]
    if len(names) > len(set(names)):
        yield "several writes to one table"


@pytest.fixture(params=CASES, ids=lambda case: str(case[0]))
async def case(
    request: pytest.FixtureRequest, url_of: Callable[[Backend], URL]
) -> tuple[str, Backend, Said]:
    """Return an engine, the backend it is taken for, and all that is sent to it."""
    engine, backend = request.param
    name = f"fsm_{uuid.uuid4().hex}"
    said = await everything_said(backend, url_of(backend), name, dict(ENGINES[engine].kin))
    return engine, backend, said


async def test_each_construct_is_in_the_list_of_the_engine(case: tuple[str, Backend, Said]) -> None:
    name, backend, said = case
    engine = ENGINES[name]
    assert set(said) == set(EVERYTHING)
    unknown, out_of_place = [], []
    for heading, statements in said.items():
        for statement in statements:
            for construct in constructs(statement, backend) - CORE - set(engine.takes):
                where = f"{name}: {construct}, in {heading}: {' '.join(statement.split())}"
                if construct not in engine.lacks:
                    unknown.append(where)
                elif heading not in engine.lacks[construct][1]:
                    out_of_place.append(where)
    assert unknown == [], "\n".join(unknown)
    assert out_of_place == [], "\n".join(out_of_place)


def test_a_statement_outside_the_list_would_be_found() -> None:
    [backend] = POSTGRESQL[:1]
    found = constructs("SELECT jsonb_path_query(a, 'x') FROM t FOR SHARE SKIP LOCKED", backend)
    assert {"FOR SHARE", "SKIP LOCKED"} <= found
    assert found - CORE - set(ENGINES["YugabyteDB"].takes) >= {"FOR SHARE"}
    writes = "WITH a AS (UPDATE t SET i = 1), b AS (DELETE FROM t) SELECT 1"
    assert "several writes to one table" in constructs(writes, backend)
