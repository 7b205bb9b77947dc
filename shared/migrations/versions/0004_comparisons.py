"""a recorded chunk has its comparisons, and its candidates say whether they are barred"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("chunks", sa.Column("comparisons", sa.JSON(), nullable=True))
    op.add_column("candidates", sa.Column("barred", sa.Boolean(), nullable=False, server_default=sa.false()))


def downgrade() -> None:
    op.drop_column("candidates", "barred")
    op.drop_column("chunks", "comparisons")
