#!/usr/bin/env bash
# A pipeline in the background. Usage:
# run_pipeline.sh start|stop [FOLDER [run|generate]]   `shori run`, or `shori generate`; without a word, start means run
#                                                      and stop means both
# run_pipeline.sh status|wait|logs [FOLDER]            how far it is; until all is shown that there is; its log lines
#
# FOLDER holds shori.toml (default: pipelines/orders-history). Process ids are in FOLDER/.shori, logs in FOLDER/logs. The
# program is SHORI, else dist/shori, else the one on PATH.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

action=${1:-} folder=${2:-$root/pipelines/orders-history} task=${3:-}
patience_seconds=60
look_every_seconds=0.2

fail() {
    echo "error: $*" >&2
    exit 1
}

[ -f "$folder/shori.toml" ] || fail "there is no pipeline in $folder: it has no shori.toml"
folder=$(cd "$folder" && pwd)
config=$folder/shori.toml state=$folder/.shori logs=$folder/logs
shori=${SHORI:-$root/dist/shori}
[ -x "$shori" ] || shori=$(command -v shori) || fail "there is no program shori: make build, or name it as SHORI"
# What runs in the background tells more, unless somebody has said how much.
grep -qsE '^(export +)?LOG_LEVEL=' "$folder/.env" || export LOG_LEVEL=${LOG_LEVEL:-info}

# The process id of a task that runs. One that was given to another program since is no task of ours.
pid_of() {
    local pid
    pid=$(cat "$state/$1.pid" 2>/dev/null) && [ -n "$pid" ] || return 1
    [[ "$(ps -ww -o stat=,args= -p "$pid" 2>/dev/null)" = [!Z]*" $1 -c $config"* ]] && echo "$pid"
}

# Looks until a command succeeds, or says that it is in vain (status 2).
until_true() {
    local until=$((SECONDS + patience_seconds)) status
    while :; do
        status=0
        "$@" || status=$?
        case $status in 0) return 0 ;; 2) return 1 ;; esac
        [ $SECONDS -lt $until ] || return 1
        sleep $look_every_seconds
    done
}

is_reached() {
    pid_of run >/dev/null || return 2
    [[ "$("$shori" status -c "$config" --json 2>/dev/null)" = *'"running":true'* ]]
}

is_shown() {
    pid_of run >/dev/null || return 2
    local status
    status=$("$shori" status -c "$config" --json 2>/dev/null) || return 1
    [[ "$status" = *'"status":"OK"'* && "$status" != *'"status":"INIT"'* ]]
}

has_ended() { ! pid_of "$1" >/dev/null; }

start() {
    local pid words
    if pid=$(pid_of "$1"); then
        echo "shori $1 runs already (process $pid)"
        return
    fi
    mkdir -p "$state" "$logs"
    [ ! -f "$logs/$1.out" ] || mv "$logs/$1.out" "$logs/$1.out.before"
    words=("$1" -c "$config")
    [ "$1" != run ] || words+=(--log-dir "$logs")
    # In a session of its own: Ctrl-C in this terminal is not meant for it.
    local apart=()
    ! command -v setsid >/dev/null || apart=(setsid)
    nohup "${apart[@]}" "$shori" "${words[@]}" </dev/null >"$logs/$1.out" 2>&1 &
    echo $! >"$state/$1.pid"
    echo "shori $1 has started (process $!, logs in $logs)"
    if [ "$1" = run ] && ! until_true is_reached; then
        tail -q -n 3 "$logs/shori.log" "$logs/run.out" >&2 2>/dev/null || true
        pid_of run >/dev/null || fail "the pipeline has ended by itself"
        fail "the pipeline cannot be reached after $patience_seconds s; it goes on trying"
    fi
}

stop() {
    local pid
    if ! pid=$(pid_of "$1"); then
        echo "shori $1 does not run"
    else
        kill -TERM "$pid"
        until_true has_ended "$1" ||
            fail "shori $1 has not ended within $patience_seconds s; kill -KILL $pid loses nothing that was committed"
        echo "shori $1 has ended"
    fi
    rm -f "$state/$1.pid"
}

tell() {
    local pid
    if pid=$(pid_of "$1"); then
        echo "shori $1: process $pid"
    elif [ -f "$state/$1.pid" ]; then
        echo "shori $1: ended by itself; what it printed last is in $logs/$1.out"
        tail -n 1 "$logs/$1.out" 2>/dev/null || true
    else
        echo "shori $1: not started"
    fi
}

case $action in
start) start "${task:-run}" ;;
stop)
    case $task in
    '')
        stop generate
        stop run
        ;;
    *) stop "$task" ;;
    esac
    ;;
status)
    tell run
    tell generate
    echo
    exec "$shori" status -c "$config"
    ;;
wait) until_true is_shown || fail "the pipeline has not shown everything within $patience_seconds s: run_pipeline.sh status tells more" ;;
logs)
    [ -d "$logs" ] || fail "there are no logs yet: start the pipeline"
    touch "$logs/run.out" "$logs/generate.out"
    exec tail -n "${LINES_BEFORE:-40}" -F "$logs/shori.log" "$logs/run.out" "$logs/generate.out"
    ;;
*) fail "usage: run_pipeline.sh start|status|stop|wait|logs [FOLDER]" ;;
esac
