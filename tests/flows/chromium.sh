#!/usr/bin/env bash
# Chromium with its driver, for tests that open pages.
#
#   chromium.sh run COMMAND...     install them where that can be done, then run the command;
#                                  where they are not installed and cannot be, say so and run the command without
set -euo pipefail

packages=(chromium chromium-driver)

say() { echo "chromium.sh: $*" >&2; }
installed() { command -v chromium >/dev/null && command -v chromedriver >/dev/null; }

install() {
    installed && return
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
    say "installing ${packages[*]}"
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends "${packages[@]}" >/dev/null 2>&1 ||
        { apt-get update -qq >/dev/null 2>&1 &&
            DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends "${packages[@]}" >/dev/null 2>&1; }
    installed
}

[ "${1:-}" = run ] && [ $# -ge 2 ] || { say "usage: chromium.sh run COMMAND..."; exit 1; }
shift
install || say "Chromium cannot be installed here, so the tests marked 'browser' are skipped: apt-get install ${packages[*]}"
exec "$@"
