#!/usr/bin/env bash
# The two PostgreSQL servers of this pipeline: by Docker compose, or else with the programs that are installed, in the folder
# that DATA names (default: data, beside this file). SERVERS=docker, local or none decides. Usage:
# servers.sh start|stop|status|remove
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
scripts=${SCRIPTS:-$here/../../scripts}
data=${DATA:-$here/data}

fail() {
    echo "error: $*" >&2
    exit 1
}

# A setting of the environment, else of .env, else the default: as shori.toml reads it.
setting() {
    local value
    if [ -n "${!1+set}" ]; then
        echo "${!1}"
        return
    fi
    value=$(sed -nE "s/^(export +)?$1=//p" "$here/.env" 2>/dev/null | tail -n 1)
    value=${value%\"} value=${value#\"} value=${value%\'} value=${value#\'}
    echo "${value:-$2}"
}

is_here() { case $(setting "$1" localhost) in localhost | 127.0.0.1 | ::1) ;; *) return 1 ;; esac }

has_docker() { docker compose version >/dev/null 2>&1 && docker info >/dev/null 2>&1; }

which_servers() {
    local chosen
    chosen=$(setting SERVERS '')
    case $chosen in
    docker | local | none) echo "$chosen" ;;
    '')
        if ! is_here DB_HOST && ! is_here WAREHOUSE_DB_HOST; then
            echo none
        elif [ -d "$data/source" ] || [ -d "$data/warehouse" ] || ! has_docker; then
            echo local
        else
            echo docker
        fi
        ;;
    *) fail "SERVERS is $chosen, and must be docker, local or none" ;;
    esac
}

# Those of the two whose host is this machine.
ours() {
    ! is_here DB_HOST || echo source
    ! is_here WAREHOUSE_DB_HOST || echo warehouse
}

each_local() {
    local server
    for server in source warehouse; do
        [ ! -d "$data/$server" ] || "$scripts/local_postgres.sh" "$1" "$data/$server"
    done
}

start_local() {
    local server prefix database port settings
    for server in $(ours); do
        prefix='' database=operational_db port=5434 settings=(wal_level=logical)
        [ "$server" = source ] || prefix=WAREHOUSE_ database=warehouse_db port=5433 settings=()
        mkdir -p "$data"
        PGPASSWORD=$(setting "${prefix}DB_PASSWORD" postgres) "$scripts/local_postgres.sh" start "$data/$server" \
            "$(setting "${prefix}DB_PORT" $port)" "$(setting "${prefix}DB_NAME" $database)" \
            "$(setting "${prefix}DB_USER" postgres)" "${settings[@]}"
    done
}

servers=$(which_servers)
cd "$here"
case $servers-${1:-} in
docker-start)
    mapfile -t services < <(ours)
    docker compose up --detach --wait "${services[@]}"
    ;;
docker-stop) docker compose stop ;;
docker-status) docker compose ps ;;
docker-remove) docker compose down --volumes ;;
local-start) start_local ;;
local-stop | local-status) each_local "$1" ;;
local-remove)
    if [ -d "$data" ]; then
        each_local remove
        rmdir "$data" 2>/dev/null || echo "$data holds files that are not ours: they stay"
    fi
    ;;
none-start | none-stop | none-status | none-remove) echo "the databases are not on this machine: nothing to $1" ;;
*) fail "usage: servers.sh start|stop|status|remove" ;;
esac
