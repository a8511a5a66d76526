#!/usr/bin/env bash
# Cuts the power of a User-Mode Linux guest that serves, and compares its disk with what was promised.
#
#   scripts/power_cut_guest.sh [POINTS] [SEED] [PART]      20, 1 and guest unless given
#
# guest     kills the guest; some 5 s each
# reorder   records every write of the guest with dm-log-writes, and then makes the disks that a cut between any two
#           of them could have left: all up to a flush, and any blocks of what came after it; some 0.5 s each
#
# Needs root, ip, losetup, and dmsetup for reorder. The kernel and the program that loads its modules come from the Debian
# packages user-mode-linux and kmod and are kept in ${TENSORFERRY_CACHE:-~/.cache/tensorferry}; TENSORFERRY_UML names
# another kernel, at usr/bin/linux.uml of a folder that has both packages. Its version is 6.1, whatever runs here.
set -euo pipefail
cd "$(dirname "$0")/.."

cache=${TENSORFERRY_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/tensorferry}/uml
kernel=${TENSORFERRY_UML:-$cache/tree/usr/bin/linux.uml}
if [ ! -x "$kernel" ] || [ ! -x "${kernel%usr/bin/*}bin/kmod" ]; then
    mkdir -p "$cache"
    if ! (cd "$cache" && apt-get download user-mode-linux kmod >/dev/null &&
        for package in *.deb; do dpkg -x "$package" tree; done); then
        echo "not run: power cuts of a guest (user-mode-linux, kmod)"
        [ "${CI:-}" != true ]
        exit
    fi
fi
# The guest hides /dev, so nothing of this may lie there.
export TENSORFERRY_UML=$kernel TENSORFERRY_FAULT_POINTS=${1:-20} TENSORFERRY_SEED=${2:-1}
exec scripts/faults.sh full "${3:-guest}"
