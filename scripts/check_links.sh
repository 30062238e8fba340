#!/usr/bin/env bash
# Fails when a page links to a file of this repository that is not there.
set -euo pipefail
cd "$(dirname "$0")/.."

broken=0
while IFS= read -r page; do
    while IFS= read -r link; do
        target=${link%%#*}
        case "$target" in '' | http:* | https:* | mailto:*) continue ;; esac
        if [ ! -e "$(dirname "$page")/$target" ]; then
            echo "$page links to $target, which is not there" >&2
            broken=1
        fi
    done < <(grep -oE '\]\([^) ]+\)' "$page" | sed -E 's/^\]\(//; s/\)$//')
done < <(git ls-files '*.md')
exit $broken
