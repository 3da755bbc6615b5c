#!/usr/bin/env bash
# Installs what `make cluster` runs, from the packages of Debian 12 or a later release; as root.
# The services that come with the packages are not needed: the tests start servers of their own.
set -euo pipefail

apt-get update
# The packages' own services do not start: a policy says so for as long as they are installed.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
fi
DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
    iproute2 util-linux \
    postgresql patroni python3-etcd etcd-server etcd-client haproxy pgbouncer \
    mariadb-server mariadb-backup galera-4 rsync

# The release's PgBouncer may be older than 1.21, which was the first to know prepared statements.
"$(dirname "$0")/install_pgbouncer.sh"
