#!/bin/sh
# `make env`: writes .env for docker compose with new tokens and passwords, readable by you alone. Never overwrites one:
# Redis and PostgreSQL keep the passwords that their volumes were made with.
set -eu
target=${1:-.env}
if [ -e "$target" ]; then
    echo "$target is there already: its passwords belong to the volumes that were made with it. Edit it, or remove it" \
        "together with the volumes (docker compose down --volumes)" >&2
    exit 1
fi
secret() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }
umask 077
set -C # the shell creates the file itself, or fails: nobody else's is written to
cat > "$target" <<END
# Secrets of this machine's stack. Keep them here; git ignores this file.
HEADWATER_TOKEN=$(secret)
REDIS_PASSWORD=$(secret)
POSTGRES_PASSWORD=$(secret)
GRAFANA_PASSWORD=$(secret)

# What may be set besides, and what it is then, stands in docs/compose.md. For example:
# STACK_CONFIG=./configs/starter.toml
# STACK_DOCUMENTS=./articles
# STACK_HF_CACHE=$HOME/.cache/huggingface
# COMPOSE_FILE=docker-compose.yml:compose/monitoring.yml
END
echo "$target is written, for you alone to read: next, docker compose up -d --wait"
