#!/usr/bin/env bash
# A throw-away S3 server for tests: Ceph's radosgw with one monitor and one OSD, all on 127.0.0.1, all data in memory.
#
#   ceph.sh run COMMAND...     start one, run the command with SHARDMILL_RADOSGW_ENV set, stop it whatever happens;
#                              where Ceph is not installed and cannot be, say so and run the command without
#   ceph.sh start DIR [PORT]   start one; DIR/env holds its address and keys as `export` lines
#   ceph.sh stop DIR           stop it by its process ids and delete DIR
#
# It takes a free port for S3 and the next one for the monitor, about 20 s to start, and up to 500 MB of memory.
# Nothing is encrypted or authenticated within the cluster, and nobody but this machine reaches it.
set -euo pipefail

packages=(radosgw ceph-mon ceph-osd)
tools=(monmaptool ceph-mon ceph-osd ceph radosgw radosgw-admin)

say() { echo "ceph.sh: $*" >&2; }
die() { say "$*"; exit 1; }
listening() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
installed() { for tool in "${tools[@]}"; do command -v "$tool" >/dev/null || return 1; done; }

install() {
    installed && return
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
    say "installing ${packages[*]}"
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends "${packages[@]}" >/dev/null 2>&1 ||
        { apt-get update -qq >/dev/null 2>&1 &&
            DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends "${packages[@]}" >/dev/null 2>&1; }
    installed
}

free_port() { # of two that follow each other
    local port
    for ((port = 9130; port < 9330; port += 2)); do
        listening "$port" || listening $((port + 1)) || { echo "$port"; return; }
    done
    die "no free port between 9130 and 9330"
}

step() { # one command, quietly; what it said is shown if it fails
    "$@" >>"$dir/log/setup.log" 2>&1 || { tail -n 20 "$dir/log/setup.log" >&2; die "failed: $*"; }
}

wait_for() { # up to 30 s for a condition
    local what=$1 i
    shift
    for ((i = 0; i < 300; i++)); do "$@" && return; sleep 0.1; done
    die "$what did not come up"
}

osd_up() { ceph -c "$dir/ceph.conf" osd stat 2>/dev/null | grep -q '1 up'; }

configure() {
    cat >"$dir/ceph.conf" <<CONF
[global]
fsid = $1
mon_host = [v2:127.0.0.1:$((port + 1))/0]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_ipv4 = true
ms_bind_msgr1 = false
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
# radosgw asks the monitor for an encrypted connection, which does not exist without keys: it would hang
ms_mon_client_mode = crc
client_mount_timeout = 20
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pgp_num = 4
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 2000
run_dir = $dir/run
pid_file = $dir/run/\$name.pid
log_file = $dir/log/\$name.log
log_to_stderr = false
# the path of a socket may have 107 characters at most, and none is needed
admin_socket =
mon_data = $dir/mon
osd_data = $dir/osd
osd_objectstore = memstore
memstore_device_bytes = 8589934592
osd_max_object_name_len = 460
osd_max_object_namespace_len = 64
[client.admin]
rgw_frontends = beast endpoint=127.0.0.1:$port
rgw_thread_pool_size = 32
rgw_enable_usage_log = false
rgw_gc_obj_min_wait = 5
CONF
    cat >"$dir/env" <<ENV
export AWS_ENDPOINT_URL=http://127.0.0.1:$port AWS_DEFAULT_REGION=us-east-1
export AWS_ACCESS_KEY_ID=radosgw-access AWS_SECRET_ACCESS_KEY=radosgw-secret-of-the-tests
ENV
}

start() { # runs in a subshell, so that the trap is its own
    dir=$1 port=${2:-$(free_port)}
    installed || die "not installed: apt-get install ${packages[*]}"
    [ -z "$(ls -A "$dir" 2>/dev/null)" ] || die "$dir is not empty"
    mkdir -p "$dir"
    dir=$(cd "$dir" && pwd)
    mkdir "$dir/mon" "$dir/osd" "$dir/run" "$dir/log"
    trap '[ $? = 0 ] || stop "$dir"' EXIT
    local fsid osd conf=(-c "$dir/ceph.conf")
    fsid=$(cat /proc/sys/kernel/random/uuid)
    osd=$(cat /proc/sys/kernel/random/uuid)
    configure "$fsid"
    step monmaptool --create --fsid "$fsid" --addv a "[v2:127.0.0.1:$((port + 1))/0]" "$dir/monmap"
    step ceph-mon "${conf[@]}" --mkfs -i a --monmap "$dir/monmap"
    step ceph-mon "${conf[@]}" -i a
    step ceph "${conf[@]}" osd new "$osd"
    step ceph-osd "${conf[@]}" -i 0 --mkfs --osd-uuid "$osd"
    step ceph "${conf[@]}" osd crush add osd.0 1.0 host=localhost root=default
    step ceph-osd "${conf[@]}" -i 0
    wait_for "the OSD" osd_up
    step radosgw-admin "${conf[@]}" user create --uid=test --display-name=test \
        --access-key=radosgw-access --secret-key=radosgw-secret-of-the-tests
    step radosgw "${conf[@]}" -n client.admin
    wait_for radosgw listening "$port"
    say "radosgw listens on http://127.0.0.1:$port; its settings are in $dir/env"
}

ours() { tr '\0' ' ' <"/proc/$1/cmdline" 2>/dev/null | grep -qF -- "$2/ceph.conf"; }

stop() { # gateway first; only processes whose command line names the configuration of this folder
    [ -d "$1" ] || return 0
    local where pid i name
    where=$(cd "$1" && pwd)
    [ -e "$where/ceph.conf" ] || [ -d "$where/run" ] || die "$where was not made by this script"
    for name in client.admin osd.0 mon.a; do
        pid=$(cat "$where/run/$name.pid" 2>/dev/null) && ours "$pid" "$where" || continue
        kill "$pid"
        for ((i = 0; i < 50; i++)); do ours "$pid" "$where" || break; sleep 0.1; done
        if ours "$pid" "$where"; then kill -9 "$pid"; fi
    done
    rm -rf -- "$where"
}

run() {
    if ! install; then
        say "Ceph cannot be installed here, so the tests marked 'ceph' are skipped: apt-get install ${packages[*]}"
        exec "$@"
    fi
    home=$(mktemp -d)
    trap 'stop "$home/ceph" && rm -rf "$home"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    (start "$home/ceph")
    SHARDMILL_RADOSGW_ENV=$home/ceph/env "$@"
}

case ${1:-} in
run) [ $# -ge 2 ] || die "run what?" ;;
start | stop) [ $# -ge 2 ] || die "which folder?" ;;
*) die "usage: ceph.sh run COMMAND... | start DIR [PORT] | stop DIR" ;;
esac
"$@"
