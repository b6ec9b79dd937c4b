"""PostgreSQL's sessions: how long each of ours waits, and that it is ours alone whatever pooler is between. Knows no
table.

A pooler refuses what it does not know in the first packet (PgBouncer: "unsupported startup parameter: options"), so
limits are set by a session's first statement.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Engine, event, make_url

from adapters_store.errors import StoreError

_ROUNDS = 3


def connect_limits(url: str) -> dict[str, str]:
    """For libpq: to connect, to have a packet acknowledged (ms), and to find a silent connection dead.

    Values in the URL take precedence.
    """
    limits = {"connect_timeout": "5", "tcp_user_timeout": "10000"}
    limits |= {"keepalives_idle": "10", "keepalives_interval": "5", "keepalives_count": "3"}
    return {name: value for name, value in limits.items() if name not in make_url(url).query}


def limit_sessions(engine: Engine, **limits: str) -> None:
    """Set these parameters in each new session, unless the URL has `options` of its own."""
    if "options" in engine.url.query:
        return
    statement = "; ".join(f"SET {name} = '{value}'" for name, value in limits.items())

    @event.listens_for(engine, "connect")
    def _set(connection: Any, _record: object) -> None:
        with connection.cursor() as cursor:
            cursor.execute(statement)
        connection.commit()


def require_own_sessions(engine: Engine) -> None:
    """Raises StoreError (pooler_shares_sessions): two connections that are open at once were answered by one session.

    A busy pooler may give them different sessions by chance, and pass. One that keeps them apart is never refused.
    """
    autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")
    with autocommit.connect() as one, autocommit.connect() as other:
        pairs = [(_session(one), _session(other)) for _ in range(_ROUNDS)]
    if len(set(pairs)) > 1 or pairs[0][0] == pairs[0][1]:
        message = "a pooler gives one session of PostgreSQL to several connections (PgBouncer: pool_mode = transaction)"
        raise StoreError("pooler_shares_sessions", f"{message}; use pool_mode = session, or connect past the pooler")


def _session(connection: Connection) -> int:
    return int(connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())
