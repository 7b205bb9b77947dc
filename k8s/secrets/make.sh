#!/bin/sh
# Writes the files that k8s/secrets/kustomization.yaml reads, with fresh passwords. Files that are there stay.
set -eu
cd "$(dirname "$0")"
umask 077

random() { head -c 32 /dev/urandom | base64 | tr '+/' '-_' | tr -d '=\n'; }
write() { # FILE, content on standard input
    if [ -e "$1" ]; then
        echo "k8s/secrets/$1 is there already and stays"
    else
        cat > "$1.tmp" && mv "$1.tmp" "$1" && echo "k8s/secrets/$1 written"
    fi
}
value() { sed -n "s/^$2=//p" "$1"; }

write tokens.env <<EOF
HEADWATER_TOKEN=$(random)
EOF
write redis.env <<EOF
REDISCLI_AUTH=$(random)
EOF
write postgres.env <<EOF
POSTGRES_PASSWORD=$(random)
EOF
# With managed services: their URLs (rediss:// and ?sslmode=verify-full where they offer it).
write stores.env <<EOF
HEADWATER_REDIS__URL=redis://:$(value redis.env REDISCLI_AUTH)@redis:6379/0
HEADWATER_DATABASE__URL=postgresql+psycopg://headwater:$(value postgres.env POSTGRES_PASSWORD)@postgres:5432/headwater
EOF
write models.env < /dev/null
write endpoint.env < /dev/null
