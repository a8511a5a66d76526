#!/usr/bin/env bash
# Cuts the power of a User-Mode Linux guest that serves, and compares its disk with what was promised.
#
#   scripts/power_cut_guest.sh [POINTS] [SEED]      20 and 1 unless given; some 5 s each
#
# Needs root, ip and losetup. The kernel comes from the Debian package user-mode-linux and is kept in
# ${TENSORFERRY_CACHE:-~/.cache/tensorferry}; TENSORFERRY_UML names another one. Its kernel is 6.1, whatever runs here.
set -euo pipefail
cd "$(dirname "$0")/.."

cache=${TENSORFERRY_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/tensorferry}/uml
kernel=${TENSORFERRY_UML:-$cache/tree/usr/bin/linux.uml}
if [ ! -x "$kernel" ]; then
    mkdir -p "$cache"
    if ! (cd "$cache" && apt-get download user-mode-linux >/dev/null && dpkg -x user-mode-linux_*.deb tree); then
        echo "not run: power cuts of a guest (user-mode-linux)"
        [ "${CI:-}" != true ]
        exit
    fi
fi
# The guest hides /dev, so nothing of this may lie there.
export TENSORFERRY_UML=$kernel TENSORFERRY_FAULT_POINTS=${1:-20} TENSORFERRY_SEED=${2:-1}
exec scripts/faults.sh full guest
