#!/usr/bin/env bash
# A PostgreSQL server of one's own in a folder, for this machine alone, with the programs that are installed. Usage:
# local_postgres.sh start FOLDER PORT DATABASE USER [SETTING=VALUE...]   (its password: PGPASSWORD)
# local_postgres.sh stop|status|remove FOLDER
set -euo pipefail

action=${1:-} folder=${2:-}
data=$folder/data log=$folder/server.log
# For a server to start, or to end; far more than a busy machine needs.
patience_seconds=60

fail() {
    echo "error: $*" >&2
    exit 1
}

case $action in
start) [ $# -ge 5 ] || fail "usage: local_postgres.sh start FOLDER PORT DATABASE USER [SETTING=VALUE...]" ;;
stop | status | remove) [ $# -eq 2 ] || fail "usage: local_postgres.sh $action FOLDER" ;;
*) fail "usage: local_postgres.sh start|stop|status|remove FOLDER ..." ;;
esac

# PostgreSQL refuses to run as root.
as=()
if [ "$(id -u)" = 0 ]; then
    id postgres >/dev/null 2>&1 || fail "PostgreSQL does not run as root, and there is no user postgres to run it as"
    if command -v setpriv >/dev/null; then
        as=(setpriv --reuid=postgres --regid=postgres --clear-groups)
    else
        as=(runuser -u postgres --)
    fi
fi

programs() {
    local found
    for found in "${SHORI_POSTGRES_BIN:-}" $(printf '%s\n' /usr/lib/postgresql/*/bin | sort -rV) \
        "$(pg_config --bindir 2>/dev/null)" "$(dirname "$(command -v initdb || echo none)")"; do
        if [ -n "$found" ] && [ -x "$found/initdb" ] && [ -x "$found/pg_ctl" ]; then
            echo "$found"
            return
        fi
    done
    fail "there is no PostgreSQL server: install Debian's postgresql, or name a folder of its programs as SHORI_POSTGRES_BIN"
}

# In a folder that anybody can reach: the server's user may not see ours.
run() { (cd / && "${as[@]}" "$bin/$1" "${@:2}"); }

is_running() { [ -f "$data/PG_VERSION" ] && run pg_ctl status -D "$data" >/dev/null 2>&1; }

# All or nothing: what was begun and not finished is begun anew.
make_cluster() {
    local port=$1 database=$2 user=$3 new=$folder/data.new
    shift 3
    mkdir -p "$folder"
    [ ${#as[@]} = 0 ] || chown postgres: "$folder"
    "${as[@]}" test -w "$folder" ||
        { rmdir "$folder" && fail "the user postgres, which the server runs as where we are root, cannot reach $folder: name another as DATA"; }
    rm -rf "$new"
    printf '%s\n' "${PGPASSWORD:-postgres}" >"$folder/password"
    chmod 600 "$folder/password"
    [ ${#as[@]} = 0 ] || chown postgres: "$folder/password"
    run initdb -D "$new" -U "$user" -A scram-sha-256 --pwfile="$folder/password" -E UTF8 --locale=C >"$folder/initdb.log" 2>&1 ||
        { cat "$folder/initdb.log" >&2 && fail "no cluster was made in $folder"; }
    rm -f "$folder/password"
    {
        # By TCP alone: the path of a socket may be too long.
        printf "listen_addresses = 'localhost'\nunix_socket_directories = ''\nport = %s\n" "$port"
        printf "%s\n" "$@"
    } >>"$new/postgresql.conf"
    if [ "$database" != postgres ]; then
        echo "create database \"${database//\"/\"\"}\"" | run postgres --single -D "$new" postgres >>"$folder/initdb.log" 2>&1 ||
            { cat "$folder/initdb.log" >&2 && fail "database $database was not made"; }
    fi
    mv "$new" "$data"
}

start() {
    local port=$1
    if is_running; then
        echo "PostgreSQL on port $(sed -n 4p "$data/postmaster.pid") runs already ($folder)"
        return
    fi
    if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
        fail "port $port is taken by another program: stop it, or set another port in .env"
    fi
    [ -f "$data/PG_VERSION" ] || make_cluster "$@"
    run pg_ctl start -D "$data" -l "$log" -o "-p $port" -w -t $patience_seconds >/dev/null ||
        { tail -n 20 "$log" >&2 && fail "PostgreSQL did not start; its log is $log"; }
    echo "PostgreSQL on port $port has started ($folder)"
}

stop() {
    if is_running; then
        run pg_ctl stop -D "$data" -m fast -w -t $patience_seconds >/dev/null ||
            fail "PostgreSQL did not stop within $patience_seconds s; its log is $log"
        echo "PostgreSQL has stopped ($folder)"
    fi
}

bin=$(programs)
case $action in
start) start "${@:3}" ;;
stop) stop ;;
status)
    if is_running; then
        echo "PostgreSQL on port $(sed -n 4p "$data/postmaster.pid") runs ($folder)"
    else
        echo "PostgreSQL does not run ($folder)"
    fi
    ;;
remove)
    stop
    rm -rf "$data" "$data.new" "$log" "$folder/initdb.log" "$folder/password"
    [ ! -d "$folder" ] || rmdir "$folder"
    ;;
esac
