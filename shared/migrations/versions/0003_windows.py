"""what travels is called a window, its weights a weight version, and a run has a form"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_COLUMNS = (
    ("windows", "policy_version", "weight_version"),
    ("candidates", "policy_version", "weight_version"),
    ("steps", "policy_version", "weight_version"),
    ("chunks", "document_id", "window_id"),
)


def upgrade() -> None:
    op.rename_table("documents", "windows")
    for table, old, new in _COLUMNS:
        _rename_column(table, old, new)
    _rename_index("windows", "documents_by_state", "windows_by_state", ["run_id", "state"])
    _rename_index("chunks", "ix_chunks_document_id", "ix_chunks_window_id", ["window_id"])
    _rename_key("documents_pkey", "windows_pkey")
    op.add_column("runs", sa.Column("form", sa.Integer(), nullable=False, server_default="1"))


def downgrade() -> None:
    op.drop_column("runs", "form")
    _rename_key("windows_pkey", "documents_pkey")
    for table, old, new in _COLUMNS:
        _rename_column(table, new, old)
    _rename_index("chunks", "ix_chunks_window_id", "ix_chunks_document_id", ["document_id"])
    _rename_index("windows", "windows_by_state", "documents_by_state", ["run_id", "state"])
    op.rename_table("windows", "documents")


def _rename_column(table: str, old: str, new: str) -> None:
    op.execute(f"ALTER TABLE {table} RENAME COLUMN {old} TO {new}")


def _rename_index(table: str, old: str, new: str, columns: list[str]) -> None:
    if _is_postgresql():
        op.execute(f"ALTER INDEX {old} RENAME TO {new}")
    else:
        op.drop_index(old, table)
        op.create_index(new, table, columns)


def _rename_key(old: str, new: str) -> None:
    if _is_postgresql():
        op.execute(f"ALTER TABLE windows RENAME CONSTRAINT {old} TO {new}")


def _is_postgresql() -> bool:
    return op.get_bind().dialect.name == "postgresql"
