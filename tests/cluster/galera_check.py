"""Answers by HTTP whether the Galera node of its host may be written to: for HAProxy's check.

Started on the host of each node, beside the server, with its own port and the server's.
"""

from __future__ import annotations

import sys
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pymysql

_PATIENCE = 1  # seconds
_SYNCED = "4"


class Check(BaseHTTPRequestHandler):
    """Says 200 of a node that is synced and part of a primary component, 503 of others."""

    server_port: int

    def do_OPTIONS(self) -> None:
        """Answer HAProxy."""
        try:
            is_fine = self._is_synced()
        except (pymysql.Error, OSError):
            is_fine = False
        self.send_response(200 if is_fine else 503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""

    def _is_synced(self) -> bool:
        connection = pymysql.connect(
            host="127.0.0.1",
            port=self.server_port,
            user="root",
            connect_timeout=_PATIENCE,
            read_timeout=_PATIENCE,
        )
        with closing(connection), connection.cursor() as cursor:
            cursor.execute(
                "SHOW GLOBAL STATUS WHERE Variable_name IN "
                "('wsrep_local_state', 'wsrep_cluster_status', 'wsrep_ready')"
            )
            return dict(cursor.fetchall()) == {
                "wsrep_local_state": _SYNCED,
                "wsrep_cluster_status": "Primary",
                "wsrep_ready": "ON",
            }


if __name__ == "__main__":
    port, Check.server_port = map(int, sys.argv[1:])
    ThreadingHTTPServer(("0.0.0.0", port), Check).serve_forever()
