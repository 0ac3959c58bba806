#!/usr/bin/env bash
# scripts/setup.sh EXTRAS [tests|bench]: a .venv as pyproject.toml and constraints.txt want it; for the tests Chromium,
# nginx, haproxy, PgBouncer and Debian's Redis where they can be had, for the benchmarks wrk, for both the locale
# en_US.UTF-8. Does nothing when they are there.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=$1 purpose=${2:-}

say() { printf 'setup: %s\n' "$*" >&2; }
give_up() { say "$*"; exit 1; }

# Installs a Debian package, where that is possible without asking anybody who is not there.
apt_install() {
    command -v apt-get >/dev/null || return 1
    say "installing $1 with apt-get"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$1" >&2 && return
    as_root apt-get update -qq >&2 && as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$1" >&2
}

as_root() {
    local root=()
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || return 1
        root=(sudo)
        [ -t 0 ] || root+=(-n)
    fi
    "${root[@]}" "$@"
}

find_python() {
    local name wanted="3.11 or newer" fits="sys.version_info >= (3, 11)"
    if [ "$(uname -m)" = aarch64 ]; then # server/machine.py says why
        wanted="3.11 or 3.13 (on arm64, uWebSockets' library is for these two)"
        fits="sys.version_info[:2] in ((3, 11), (3, 13))"
    fi
    for name in "${PYTHON:-}" python3.13 python3.12 python3.11 python3 /usr/bin/python3; do
        # Asked, not just looked up: a name on the PATH may be a shim of a version that is not there.
        if [ -n "$name" ] && "$name" -c "import sys; sys.exit(not $fits)" 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    give_up "no Python $wanted on the PATH: install one, or name it: make PYTHON=/path/to/python3"
}

make_venv() {
    local python version
    python=$(find_python)
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        apt_install "python$version-venv" || apt_install python3-venv ||
            give_up "Python $version comes without venv here: install the package python$version-venv and try again"
    fi
    say "making .venv with Python $version"
    "$python" -m venv --clear .venv
}

need_libuv() {
    [ "$(uname -m)" = aarch64 ] && return # the wheel brings its own there
    .venv/bin/python -c 'import ctypes; ctypes.CDLL("libuv.so.1")' 2>/dev/null && return
    apt_install libuv1 ||
        give_up "libuv.so.1 is missing: install libuv (Debian and Ubuntu: apt install libuv1; Fedora: dnf install libuv)"
}

need_wrk() {
    command -v wrk >/dev/null || apt_install wrk || give_up "the benchmarks need wrk: install it (apt install wrk)"
}

# The tests do without a browser, so it is asked for once: where that fails, the next run does not wait for it again.
want_chromium() {
    local asked=.cache/no-chromium
    if command -v chromium chromium-browser google-chrome >/dev/null || [ -e "$asked" ]; then return; fi
    if ! apt_install chromium; then
        touch "$asked"
        say "no Chromium could be installed: its tests will be skipped (to ask again, delete $asked)"
    fi
}

# The order that most databases have. Without it, those of the tests and benchmarks sort by bytes.
want_locale() {
    local asked=.cache/no-locale
    if locale -a 2>/dev/null | grep -qix 'en_US\.utf-\?8' || [ -e $asked ]; then return; fi
    if ! { apt_install locales && as_root localedef -i en_US -f UTF-8 en_US.UTF-8; } >&2; then
        touch $asked
        say "no locale en_US.UTF-8 could be had: databases of the tests sort by bytes (to ask again, delete $asked)"
    fi
}

# Unpacked, not installed: the package would start a server on port 80. Debian 12 has the binary in nginx, others in
# nginx-core.
want_nginx() {
    local into=.cache/nginx asked=.cache/no-nginx
    if PATH=$PATH:/usr/sbin command -v nginx >/dev/null || [ -x $into/usr/sbin/nginx ] || [ -e $asked ]; then return; fi
    say "fetching nginx with apt-get"
    mkdir -p $into
    (cd $into && apt-get download -qq nginx nginx-core >&2 2>/dev/null || apt-get download -qq nginx >&2) || true
    for package in "$into"/*.deb; do dpkg -x "$package" $into || true; done
    rm -f "$into"/*.deb
    if ! $into/usr/sbin/nginx -v 2>/dev/null; then
        touch $asked
        say "no nginx could be had: its tests will be skipped (to ask again, delete $asked)"
    fi
}

# Unpacked too, with the libraries that Debian gives to it alone: tests/haproxy.py names them to the dynamic linker.
want_haproxy() {
    local into=.cache/haproxy asked=.cache/no-haproxy libraries
    if PATH=$PATH:/usr/sbin command -v haproxy >/dev/null || [ -x $into/usr/sbin/haproxy ] || [ -e $asked ]; then return; fi
    say "fetching haproxy with apt-get"
    mkdir -p $into
    libraries=$(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces \
        --no-enhances haproxy 2>/dev/null | grep -E '^lib(lua|opentracing|pcre2-8)' | sort -u) || true
    # shellcheck disable=SC2086 # one word for each
    (cd $into && apt-get download -qq haproxy $libraries >&2) || true
    for package in "$into"/*.deb; do dpkg -x "$package" $into || true; done
    rm -f "$into"/*.deb
    if [ ! -x $into/usr/sbin/haproxy ]; then
        touch $asked
        say "no haproxy could be had: its tests will be skipped (to ask again, delete $asked)"
    fi
}

# Debian's Redis, for the tests that give one program the data of another. Unpacked, not installed, as nginx is.
want_redis() {
    local into=.cache/redis asked=.cache/no-redis libraries
    if command -v redis-server >/dev/null || [ -x $into/usr/bin/redis-server ] || [ -e $asked ]; then return; fi
    say "fetching redis-server with apt-get"
    mkdir -p $into
    for package in redis-server redis-tools libjemalloc2 liblzf1; do
        (cd $into && apt-get download -qq $package >&2 2>/dev/null) || true
    done
    for package in "$into"/*.deb; do dpkg -x "$package" $into || true; done
    rm -f "$into"/*.deb
    libraries=$(printf '%s:' $into/usr/lib/*-linux-gnu)
    if ! LD_LIBRARY_PATH=$libraries $into/usr/bin/redis-server --version >/dev/null 2>&1; then
        rm -rf $into
        touch $asked
        say "no redis-server could be had: its tests will be skipped (to ask again, delete $asked)"
    fi
}

# Unpacked for the same reason, with the libraries that a machine without it may lack.
want_pgbouncer() {
    local into=.cache/pgbouncer asked=.cache/no-pgbouncer
    if PATH=$PATH:/usr/sbin command -v pgbouncer >/dev/null || [ -x $into/usr/sbin/pgbouncer ] || [ -e $asked ]; then
        return
    fi
    say "fetching PgBouncer with apt-get"
    mkdir -p $into
    (cd $into && apt-get download -qq pgbouncer libc-ares2 >&2) || true
    (cd $into && apt-get download -qq libevent-2.1-7 >&2 2>/dev/null || apt-get download -qq libevent-2.1-7t64 >&2) || true
    for package in "$into"/*.deb; do dpkg -x "$package" $into || true; done
    rm -f "$into"/*.deb
    if ! LD_LIBRARY_PATH=$(echo $into/usr/lib/*-linux-gnu) $into/usr/sbin/pgbouncer --version >/dev/null 2>&1; then
        touch $asked
        say "no PgBouncer could be had: its tests will be skipped (to ask again, delete $asked)"
    fi
}

mkdir -p .cache
exec 9>.cache/setup.lock
if command -v flock >/dev/null; then flock 9; fi # two makes in one tree set up once

.venv/bin/python -m pip --version >/dev/null 2>&1 || make_venv
stamp=.venv/installed-$extras
wanted=$(cat pyproject.toml constraints.txt hatch_build.py server/*.[ch] | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    say "installing the dependencies ($extras)"
    .venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[$extras]"
    echo "$wanted" >"$stamp"
fi
need_libuv
if [ "$purpose" = tests ]; then
    want_chromium
    want_nginx
    want_haproxy
    want_pgbouncer
    want_redis
    want_locale
fi
if [ "$purpose" = bench ]; then
    need_wrk
    want_locale
fi
