#!/bin/sh
# docs/report-desktop.png and docs/report-phone.png from report/index.html, with chromium: the first screenful of each.
set -eu
cd "$(dirname "$0")/.."
chromium=$(command -v chromium || command -v chromium-browser || command -v google-chrome) || { echo "no chromium here (Debian: apt-get install chromium)" >&2; exit 1; }
test -f report/index.html || { echo "no report/index.html; run make run" >&2; exit 1; }
profile=$(mktemp -d)
trap 'rm -rf "$profile"' EXIT
shot() {
    "$chromium" --headless --no-sandbox --disable-gpu --hide-scrollbars --user-data-dir="$profile" --window-size="$2" \
        --screenshot="$PWD/docs/report-$1.png" "file://$PWD/report/index.html" >/dev/null 2>&1
    ls -l "docs/report-$1.png"
}
shot desktop 1280,650
shot phone 390,844
