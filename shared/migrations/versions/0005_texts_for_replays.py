"""the text of recorded windows, so that another judge can be asked what the run's judge was asked"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0003"

_COLUMNS = {"text_start": sa.Integer(), "text_end": sa.Integer(), "judge_seconds": sa.Double()}


def upgrade() -> None:
    for name, kind in _COLUMNS.items():
        op.add_column("chunks", sa.Column(name, kind, nullable=True))
    op.create_table(
        "window_texts",
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("window_id", sa.String(), nullable=False),
        sa.Column("text", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "window_id"),
    )


def downgrade() -> None:
    op.drop_table("window_texts")
    for name in _COLUMNS:
        op.drop_column("chunks", name)
