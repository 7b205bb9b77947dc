"""sizes beyond 2 GiB, fencing numbers and cursors of parts, what audit compares"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "parts",
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("part", sa.Integer(), nullable=False),
        sa.Column("lease_epoch", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "part"),
    )
    op.create_table(
        "cursors",
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("part", sa.Integer(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("num_positions", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "part", "epoch"),
    )
    # What the rows of older runs say: every position up to the highest was read.
    op.execute(
        "INSERT INTO cursors (run_id, part, epoch, num_positions) "
        "SELECT run_id, part, epoch, MAX(position) + 1 FROM documents GROUP BY run_id, part, epoch"
    )
    with op.batch_alter_table("runs", schema=None) as batch_op:
        batch_op.add_column(sa.Column("source", sa.JSON(), nullable=True))
    with op.batch_alter_table("documents", schema=None) as batch_op:
        batch_op.add_column(sa.Column("lease_epoch", sa.Integer(), nullable=False, server_default="0"))
        batch_op.add_column(sa.Column("num_windows", sa.Integer(), nullable=False, server_default="0"))
        batch_op.add_column(sa.Column("num_pairs", sa.Integer(), nullable=True))
    with op.batch_alter_table("weight_versions", schema=None) as batch_op:
        batch_op.alter_column("num_bytes", existing_type=sa.Integer(), type_=sa.BigInteger(), existing_nullable=False)
    with op.batch_alter_table("candidates", schema=None) as batch_op:
        batch_op.alter_column("kind", new_column_name="kinds", existing_type=sa.String(), existing_nullable=False)
    _set_id_type("BIGINT")


def downgrade() -> None:
    _set_id_type("INTEGER")
    with op.batch_alter_table("candidates", schema=None) as batch_op:
        batch_op.alter_column("kinds", new_column_name="kind", existing_type=sa.String(), existing_nullable=False)
    with op.batch_alter_table("weight_versions", schema=None) as batch_op:
        batch_op.alter_column("num_bytes", existing_type=sa.BigInteger(), type_=sa.Integer(), existing_nullable=False)
    with op.batch_alter_table("documents", schema=None) as batch_op:
        batch_op.drop_column("num_pairs")
        batch_op.drop_column("num_windows")
        batch_op.drop_column("lease_epoch")
    with op.batch_alter_table("runs", schema=None) as batch_op:
        batch_op.drop_column("source")
    op.drop_table("cursors")
    op.drop_table("parts")


def _set_id_type(name: str) -> None:
    """Of chunks and candidates, of which a long run has more than 2**31. SQLite's INTEGER has 64 bits already."""
    if op.get_bind().dialect.name != "postgresql":
        return
    for table, column in (("chunks", "id"), ("candidates", "id"), ("candidates", "chunk_id")):
        op.execute(f"ALTER TABLE {table} ALTER COLUMN {column} TYPE {name}")
    for table in ("chunks", "candidates"):
        op.execute(f"ALTER SEQUENCE {table}_id_seq AS {name}")
