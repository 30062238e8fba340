#!/usr/bin/env bash
# The prebuilt DuckDB library: where it is kept (`directory CACHE`), and how it comes there (`fetch CACHE`).
# Building DuckDB from source takes some 30 CPU minutes; the npm package holds the same library, checked by its sha256.
set -euo pipefail

version=1.5.6
case "$(uname -s)-$(uname -m)" in
Linux-x86_64)
    platform=linux-x64 release=1.5.6-r.1 library=libduckdb.so
    sha256=3f4962cdd266eab2b479a5b5a4a6d063d279b2954ae814ed00385d553b747633
    ;;
Linux-aarch64)
    platform=linux-arm64 release=1.5.5-r.5 library=libduckdb.so sha256=d00d007f3f7ca1f2896a5e4b89c2ce141bf0508506a9d6d56f9598b8e59d074e
    ;;
Darwin-arm64)
    platform=darwin-arm64 release=1.5.5-r.5 library=libduckdb.dylib sha256=b9027d18ef3e8d960568f77e946a83ca68009cb22d71cf7f94de842afdd094d8
    ;;
*)
    platform=none release='' library='' sha256=''
    ;;
esac

directory="${2:?usage: libduckdb.sh directory|fetch CACHE}/duckdb-$version/$platform"

fetch() {
    if [ "$platform" = none ]; then
        echo "There is no prebuilt DuckDB for $(uname -s) on $(uname -m): use make FEATURES=bundled-duckdb" >&2
        exit 1
    fi
    if [ -f "$directory/$library" ] && echo "$sha256  $directory/$library" | checksum; then
        return
    fi
    command -v npm >/dev/null || { echo "npm is needed to fetch DuckDB: install nodejs and npm" >&2; exit 1; }
    echo "Fetching DuckDB $release for $platform (24 MB) into $directory"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    (cd "$work" && npm pack --silent "@duckdb/node-bindings-$platform@$release" >/dev/null && tar xzf ./*.tgz)
    echo "$sha256  $work/package/$library" | checksum || {
        echo "The DuckDB library does not have the expected sha256 $sha256: not used" >&2
        exit 1
    }
    mkdir -p "$directory"
    mv "$work/package/$library" "$directory/$library"
}

checksum() {
    if command -v sha256sum >/dev/null; then sha256sum --check --status; else shasum -a 256 --check --status; fi
}

case "$1" in
directory) echo "$directory" ;;
fetch) fetch ;;
*) echo "usage: libduckdb.sh directory|fetch CACHE" >&2 && exit 2 ;;
esac
