#!/usr/bin/env bash
# scripts/try_arm64.sh [DIRECTORY]: what `make run` does on Linux on arm64, tried under emulation on a machine of another kind.
#
# Makes an arm64 Debian 13 in DIRECTORY (.cache/arm64), puts the last commit there, runs `make run` in it, posts a score,
# reads it back over HTTP and the WebSocket, and ends it. Needs root, and Debian's debootstrap, qemu-user-static and
# binfmt-support. Takes an hour the first time. Exits with 0 if all answers were right.
set -euo pipefail
cd "$(dirname "$0")/.."
directory=$(realpath -m "${1:-.cache/arm64}")
root=$directory/root port=8097

say() { printf 'arm64: %s\n' "$*" >&2; }

if ! [ -e /proc/sys/fs/binfmt_misc/register ]; then mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc; fi
[ -e /proc/sys/fs/binfmt_misc/qemu-aarch64 ] || update-binfmts --enable qemu-aarch64

if ! [ -e "$directory/made" ]; then
    say "making a Debian for arm64 in $directory"
    mkdir -p "$directory"
    rm -rf "$root"
    debootstrap --arch=arm64 --variant=minbase \
        --include=ca-certificates,curl,gcc,git,libc6-dev,make,procps,python3,python3-venv trixie "$root" >"$directory/debootstrap.log"
    touch "$directory/made"
fi
for file in /etc/resolv.conf /etc/hosts /etc/pip.conf /etc/ssl/certs/ca-certificates.crt; do
    if [ -e "$file" ]; then cp -L --remove-destination "$file" "$root$file"; fi
done

# The packages stay: to install them takes half an hour of an emulated processor. Ours is built anew.
mkdir -p "$root/scoreboard"
find "$root/scoreboard" -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -r {} +
rm -f "$root"/scoreboard/.venv/installed-*
git archive HEAD | tar -x -C "$root/scoreboard"
mountpoint -q "$root/proc" || mount -t proc proc "$root/proc"
mountpoint -q "$root/dev" || mount --rbind --make-rslave /dev "$root/dev"

screen=$directory/screen
start() {
    say "make run, in $root"
    chroot "$root" make -C /scoreboard run PORT=$port DEV_ARGS=--no-demo >"$screen" 2>&1 &
    dev=$!
}
start
finish() {
    pkill -INT -P "$dev" 2>/dev/null || true
    wait "$dev" || true
    umount -l "$root/proc" "$root/dev"
}
trap finish EXIT
ends=0
for ((waited = 0; ; waited++)); do
    if grep -q '^curl' "$screen"; then break; fi
    if ! kill -0 "$dev" 2>/dev/null; then
        cat "$screen" >&2
        # An emulated processor may need more than the minute that `dev` waits, the first times.
        ((++ends < 4)) || exit 1
        start
    fi
    ((waited < 1800)) || { say "not ready after half an hour"; cat "$screen" >&2; exit 1; }
    sleep 1
done
cat "$screen"

say "a POST, with the line from the screen"
grep '^curl' "$screen" | chroot "$root" bash -e | tee "$directory/posted"
echo
grep -q '"newScore":5' "$directory/posted"
say "a GET"
chroot "$root" curl -sf "http://127.0.0.1:$port/leaderboard" | tee "$directory/read"
echo
grep -q '{"playerId":"player123","score":5}' "$directory/read"
say "the WebSocket"
chroot "$root" /scoreboard/.venv/bin/python - "$port" <<'PYTHON' | tee "$directory/watched"
import sys
from websockets.sync.client import connect

with connect(f"ws://127.0.0.1:{sys.argv[1]}/live-updates", open_timeout=60) as socket:
    while "leaderboardUpdate" not in (message := socket.recv(timeout=60)):  # a slow machine may not be live yet
        pass
    print(message)
PYTHON
grep -q '"topScores":\[{"playerId":"player123","score":5}\]' "$directory/watched"
chroot "$root" sh -c 'uname -m; cd /scoreboard; .venv/bin/python -V; .venv/bin/python -m pip freeze | grep -i socketify; ls server/*.so'
say "all answers were right"
