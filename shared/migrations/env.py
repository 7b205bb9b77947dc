"""Alembic's entry: runs the revisions on the connection that shared.database.migrate hands over."""

from alembic import context

from shared.database import Base

context.configure(
    connection=context.config.attributes["connection"], target_metadata=Base.metadata, render_as_batch=True
)
with context.begin_transaction():
    context.run_migrations()
