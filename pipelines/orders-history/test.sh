#!/usr/bin/env bash
# The life of this pipeline, as a newcomer leads it, in a copy of this folder and with servers on ports of its own.
# Needs the program (SHORI) and PostgreSQL's (see scripts/local_postgres.sh).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "${SCRIPTS:-$here/../../scripts}/.." && pwd)

free_port() {
    local port
    while :; do
        # Below what Linux gives to outgoing connections.
        port=$((10000 + RANDOM % 20000))
        (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
    done
    echo "$port"
}

work=$(mktemp -d)
# Servers run as another user where we are root.
chmod 755 "$work"
folder=$work/orders-history
mkdir "$folder"
cp -r "$here"/{Makefile,servers.sh,shori.toml,sql,.env.example} "$folder"
sed -e "s/^DB_PORT=.*/DB_PORT=$(free_port)/" -e "s/^WAREHOUSE_DB_PORT=.*/WAREHOUSE_DB_PORT=$(free_port)/" \
    "$folder/.env.example" >"$folder/.env"

# Of the environment, nothing but the program counts here.
unset DB_HOST DB_PORT DB_NAME DB_USER DB_PASSWORD DATA MUTATOR LOG_LEVEL MUTATION_INTERVAL_SECONDS \
    WAREHOUSE_DB_HOST WAREHOUSE_DB_PORT WAREHOUSE_DB_NAME WAREHOUSE_DB_USER WAREHOUSE_DB_PASSWORD \
    CDC_EXTRACTION_INTERVAL_SECONDS MAKEFLAGS MAKELEVEL

shori_make() {
    echo "== make $*"
    make --no-print-directory -C "$folder" ROOT="$root" SHORI="${SHORI:-$root/dist/shori}" SERVERS=local "$@"
}

finish() {
    local status=$?
    if [ $status != 0 ]; then
        tail -n 20 "$folder"/logs/*.log "$folder"/logs/*.out "$folder"/data/*/server.log >&2 2>/dev/null || true
    fi
    shori_make clean >/dev/null || status=1
    rm -rf "$work"
    [ $status != 0 ] || echo "== all of it went well"
    exit $status
}
trap finish EXIT

expect() { [[ "$2" = *"$1"* ]] || { echo "error: expected $1 in: $2" >&2 && exit 1; }; }

shori_make help
shori_make quick-start | tee "$work/printed"
expect "order_key" "$(cat "$work/printed")"
expect "shori generate: process" "$(cat "$work/printed")"
shori_make test-rapid
shori_make stop
expect "does not run" "$(shori_make stop)"
# Again, over what is there.
shori_make quick-start MUTATOR=off >/dev/null
shori_make validate
expect "not started" "$(shori_make status)"
shori_make stop
shori_make clean
[ ! -e "$folder/data" ] && [ ! -e "$folder/.shori" ] && [ ! -e "$folder/logs" ]
