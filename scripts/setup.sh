#!/usr/bin/env bash
# Installs what building Shori needs and is not there yet, and says so. Usage: setup.sh CACHE [FEATURES] [tests]
# With "tests", what the tests need too.
set -euo pipefail

cache=${1:?usage: setup.sh CACHE [FEATURES] [tests]} features=${2:-} with_tests=${3:-}

if ! command -v cargo >/dev/null; then
    echo "Rust 1.95 is needed: install it with rustup (https://rustup.rs), then run make again" >&2
    exit 1
fi

has_postgres_server() {
    local folder
    for folder in "${SHORI_POSTGRES_BIN:-}" /usr/lib/postgresql/*/bin "$(pg_config --bindir 2>/dev/null)"; do
        [ -n "$folder" ] && [ -x "$folder/postgres" ] && [ -x "$folder/initdb" ] && return
    done
    return 1
}

missing=()
command -v cc >/dev/null || missing+=(gcc)
command -v c++ >/dev/null || missing+=(g++)
command -v npm >/dev/null || missing+=(npm)
# The tests start servers of their own.
[ -z "$with_tests" ] || has_postgres_server || missing+=(postgresql)
if [ ${#missing[@]} -gt 0 ]; then
    if ! command -v apt-get >/dev/null; then
        echo "Please install: ${missing[*]}" >&2
        exit 1
    fi
    as_root=()
    [ "$(id -u)" = 0 ] || as_root=(sudo)
    echo "Installing Debian packages: ${missing[*]}"
    # Only the programs are wanted: Debian would make a server of its own on port 5432 besides.
    no_cluster=/etc/postgresql-common/createcluster.d/shori.conf
    if [[ " ${missing[*]} " = *" postgresql "* ]]; then
        "${as_root[@]}" mkdir -p "${no_cluster%/*}"
        echo "create_main_cluster = false" | "${as_root[@]}" tee "$no_cluster" >/dev/null
    fi
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
    "${as_root[@]}" rm -f "$no_cluster"
fi

case " $features " in
*bundled-duckdb*) ;;
*)
    root=$(cd "$(dirname "$0")/.." && pwd)
    "$root/scripts/libduckdb.sh" fetch "$cache"
    # Where cargo without make looks (.cargo/config.toml).
    mkdir -p "$root/vendor"
    ln -sfn "$("$root/scripts/libduckdb.sh" directory "$cache")" "$root/vendor/duckdb"
    ;;
esac
