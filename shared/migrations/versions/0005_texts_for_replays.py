"""the text of recorded windows, so that another judge can be asked what the run's judge was asked"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

_OFFSETS = ("text_start", "text_end")


def upgrade() -> None:
    for name in _OFFSETS:
        op.add_column("chunks", sa.Column(name, sa.Integer(), nullable=True))
    op.add_column("chunks", sa.Column("judge_seconds", sa.Double(), nullable=True))
    op.create_table(
        "window_texts",
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("window_id", sa.String(), nullable=False),
        sa.Column("text", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "window_id"),
    )


def downgrade() -> None:
    op.drop_table("window_texts")
    for name in (*_OFFSETS, "judge_seconds"):
        op.drop_column("chunks", name)
