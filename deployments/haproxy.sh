#!/bin/sh
# HAProxy as Ray Serve starts it, with what it leaves open closed first. `make serve` names this script in
# RAY_SERVE_HAPROXY_BINARY_PATH, and the real program in PT2_SERVE_HAPROXY.
#
# The configuration that Ray Serve 2.60 writes binds its statistics page and its metrics on all interfaces, and makes its
# admin socket writable for every user of the machine; there is no setting for either.
set -eu

config=""
previous=""
for argument in "$@"; do
    [ "$previous" = "-f" ] && config=$argument
    previous=$argument
done
if [ -n "$config" ]; then
    sed -e 's/^\( *bind \)[*]\{0,1\}:\([0-9]*\)$/\1127.0.0.1:\2/' -e '/^ *stats socket /s/ mode 666 / mode 600 /' \
        "$config" > "$config.closed"
    mv "$config.closed" "$config"
    if grep -Eq '^ *bind ([*]?:[0-9]+( |$)|\[::\]:)|^ *stats socket .* mode 666 ' "$config"; then
        echo "haproxy.sh: $config still opens something to everybody; not started" >&2
        exit 1
    fi
fi
exec "$PT2_SERVE_HAPROXY" "$@"
