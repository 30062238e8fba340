#!/usr/bin/env bash
# Installs what building Shori needs and is not there yet, and says so. Usage: setup.sh CACHE [FEATURES]
set -euo pipefail

cache=${1:?usage: setup.sh CACHE [FEATURES]} features=${2:-}

if ! command -v cargo >/dev/null; then
    echo "Rust 1.95 is needed: install it with rustup (https://rustup.rs), then run make again" >&2
    exit 1
fi

missing=()
command -v cc >/dev/null || missing+=(gcc)
command -v c++ >/dev/null || missing+=(g++)
command -v npm >/dev/null || missing+=(npm)
if [ ${#missing[@]} -gt 0 ]; then
    if ! command -v apt-get >/dev/null; then
        echo "Please install: ${missing[*]}" >&2
        exit 1
    fi
    as_root=()
    [ "$(id -u)" = 0 ] || as_root=(sudo)
    echo "Installing Debian packages: ${missing[*]}"
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
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
