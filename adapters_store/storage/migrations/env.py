"""Alembic's entry: runs the migrations on the connection that adapters_store.storage.database hands over."""

from __future__ import annotations

from alembic import context

from adapters_store.storage.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
