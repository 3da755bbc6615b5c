#!/bin/sh
# Builds the PgBouncer of Debian's next release, which knows prepared statements (since 1.21).
#
# Usage, as root: tests/cluster/install_pgbouncer.sh [PREFIX [SUITE]]
#
# The tests use PREFIX/bin/pgbouncer (PREFIX is /opt/pgbouncer by default), or the program that the
# environment variable HYBRID_STORAGE_PGBOUNCER names. Where the packages come from is read from the
# machine's own list of sources, with the name of its release replaced.
set -eu

prefix=${1:-/opt/pgbouncer}
suite=${2:-trixie}
program=$prefix/bin/pgbouncer

if [ -x "$program" ]; then
    "$program" --version
    exit
fi

. /etc/os-release
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/lists" "$work/source"
chmod 755 "$work" "$work/source" # for apt's own user

# The mirrors of this release, in either format, as sources of the next one.
for list in /etc/apt/sources.list /etc/apt/sources.list.d/*; do
    [ -f "$list" ] || continue
    case $list in
    *.list)
        sed -nE "s/^deb (.*) $VERSION_CODENAME (.*)/deb-src \1 $suite \2/p" "$list" >> "$work/next.list"
        ;;
    *.sources)
        awk -v RS= -v ORS='\n\n' -v now="$VERSION_CODENAME" -v suite="$suite" '
            $0 ~ "Suites:[^\n]* ?" now "( |\n|$)" {
                sub(/Types:[^\n]*/, "Types: deb-src")
                sub(/Suites:[^\n]*/, "Suites: " suite)
                print
            }' "$list" >> "$work/next.sources"
        ;;
    esac
done
# apt reads one file here, and not both formats from it.
sources=$work/next.list
[ -s "$sources" ] || sources=$work/next.sources

from_next() {
    apt-get --quiet --quiet \
        -o "Dir::Etc::sourcelist=$sources" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$work/lists" "$@"
}

apt-get --quiet --quiet update
DEBIAN_FRONTEND=noninteractive apt-get --quiet --quiet install --yes --no-install-recommends \
    build-essential libevent-dev libssl-dev pkg-config
from_next update
(cd "$work/source" && from_next source --download-only pgbouncer)
tar --extract --file "$work"/source/pgbouncer_*.orig.tar.* --directory "$work" --strip-components 1
cd "$work"
./configure --quiet --prefix="$prefix" --without-cares --disable-debug
make --silent --jobs "$(nproc)" pgbouncer
install -D pgbouncer "$program"
"$program" --version
