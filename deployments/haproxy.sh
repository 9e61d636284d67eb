#!/bin/sh
# HAProxy as Ray Serve starts it, with what it leaves open closed first, and with the servers that it forgets. `make
# serve` names this script in RAY_SERVE_HAPROXY_BINARY_PATH, and the real program in PT2_SERVE_HAPROXY.
#
# The configuration that Ray Serve 2.60 writes binds its statistics page and its metrics on all interfaces, and makes its
# admin socket writable for every user of the machine; there is no setting for either. Nor is there one for how long a
# client may take to send a request's headers: an hour, while it holds a connection.
#
# And while Ray Serve builds a new version of an application, it does not know the replicas of the one that serves: the
# configuration has a backend without servers, and every request takes the long way through the Python proxy (issue 5;
# README, "The hop": five times the CPU time). So where a backend has lost all its servers, those of the configuration
# before stay. HAProxy asks each whether it is well, as always: a replica that drains or has gone says no, and then the
# Python proxy is asked. An address that the new configuration gives to something else is not kept.
set -eu

# Whether only the frontends of HTTP and gRPC listen elsewhere than on 127.0.0.1, gRPC's where HTTP's does (whose callers
# behind this proxy are all taken for local ones), and the admin socket is its owner's. Another Ray Serve may write
# another configuration: what opens something in a way that is not known here is not let through.
is_closed() {
    section="" http="" grpc=""
    set -f # the `*` of an address is no pattern of files' names
    while IFS= read -r line || [ -n "$line" ]; do
        set -- $line
        case ${1-} in
            "" | "#"*) continue ;;
            *[\"\'\\]*) return 1 ;;
        esac
        case $line in [!\ \	]*)
            case $1 in global | defaults | frontend | listen | backend) ;; *) return 1 ;; esac
            section="$1 ${2-}"
            ;;
        esac
        case "$1 ${2-}" in
            "stats socket")
                case " $* " in
                    *" mode "*" mode "*) return 1 ;;
                    " stats socket /"*" mode 600 "*) continue ;;
                    *) return 1 ;;
                esac
                ;;
            "bind "* | *"-bind "*) ;;
            *) continue ;;
        esac
        where=${2-}
        case $where in "" | :* | *,*) return 1 ;; esac
        case $section:$where in
            "frontend http_frontend:"*) [ -z "$http" ] && http=${where%:*} || return 1 ;;
            "frontend grpc_frontend:"*) [ -z "$grpc" ] && grpc=${where%:*} || return 1 ;;
            *":127.0.0.1:"*) ;;
            *) return 1 ;;
        esac
    done < "$1"
    [ -z "$grpc" ] || [ "$grpc" = "$http" ]
}

keep_servers() {
    awk '
        $1 ~ /^(backend|frontend|listen|defaults|global)$/ { section = $2 }
        NR == FNR { if ($1 == "server" && / check/ && !/ backup/) before[section] = before[section] $0 "\n"; next }
        { line[FNR] = $0; within[FNR] = section; last = FNR }
        $1 == "server" && !/ backup/ { found[section] = 1; taken[$3] = 1 }
        END {
            for (i = 1; i <= last; i++) {
                if (line[i] ~ / check backup/ && !found[within[i]]) {
                    kept = split(before[within[i]], old, "\n")
                    for (k = 1; k < kept; k++) { split(old[k], part, " "); if (!taken[part[3]]) print old[k] }
                }
                print line[i]
            }
        }' "$1" "$2"
}

config=""
previous=""
for argument in "$@"; do
    [ "$previous" = "-f" ] && config=$argument
    previous=$argument
done
if [ -n "$config" ]; then
    # Only these two: the frontends of HTTP and gRPC listen where `http_options.host` says.
    here='s/^\( *bind \)[*]\{0,1\}:\([0-9]*\)$/\1127.0.0.1:\2/'
    sed -e "/^frontend prometheus/,/^[a-z]/$here" -e "/^listen stats/,/^[a-z]/$here" \
        -e '/^ *stats socket /s/ mode 666 / mode 600 /' "$config" > "$config.closed"
    if ! grep -q '^ *timeout http-request ' "$config.closed"; then
        sed -i '/^defaults$/a\    timeout http-request 30s' "$config.closed"
    fi
    if [ -f "$config.before" ] && command -v awk > /dev/null; then
        keep_servers "$config.before" "$config.closed" > "$config.kept"
        mv "$config.kept" "$config.closed"
    fi
    cp "$config.closed" "$config.kept"
    mv "$config.kept" "$config.before"
    mv "$config.closed" "$config"
    if ! is_closed "$config"; then
        echo "haproxy.sh: $config still opens something to everybody; not started" >&2
        exit 1
    fi
fi
exec "$PT2_SERVE_HAPROXY" "$@"
