# Makes .venv with the package and the extras asked for.  To be sourced by bash, not run:
#   source launch/setup.sh; ensure_environment demo test
# Afterwards $ROOT is the checkout and $PYTHON the interpreter of .venv.
# pip is called only when pyproject.toml, the constraints, the interpreter or the place of the
# checkout changed since the extra was installed, so a second run needs no network.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
PYTHON="$ROOT/.venv/bin/python"

_setup_fail() {
    printf 'set-up: %s\n' "$@" >&2
    exit 1
}

# The first interpreter that is new enough.  Each candidate is run: a name on PATH may be a shim.
_setup_find_python() {
    local name
    for name in python3 python3.11 python3.12 python3.13 python3.14 python; do
        if command -v "$name" >/dev/null 2>&1 &&
            "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            printf '%s\n' "$name"
            return 0
        fi
    done
    return 1
}

_setup_make_venv() {
    local base
    base="$(_setup_find_python)" || _setup_fail \
        "no Python >= 3.11 found (tried python3, python3.11 to python3.14, python)." \
        "Install one, make sure that it is on PATH, and run this again."
    printf 'set-up: making .venv with %s\n' "$("$base" --version)" >&2
    rm -rf "$ROOT/.venv"
    "$base" -m venv "$ROOT/.venv" || {
        rm -rf "$ROOT/.venv"
        _setup_fail "'$base -m venv' failed. On Debian and Ubuntu its package is python3-venv."
    }
}

# What an installed extra depends on, as one hash.
_setup_fingerprint() {
    "$PYTHON" - "$ROOT" <<'PY'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
digest = hashlib.sha256(f"{root}\n{sys.version}\n".encode())
for name in ("pyproject.toml", "launch/constraints.txt"):
    digest.update((root / name).read_bytes())
print(digest.hexdigest())
PY
}

# ensure_environment EXTRA...: .venv exists and holds the package, editable, with these extras.
ensure_environment() {
    local fingerprint extra missing=() joined
    if ! "$PYTHON" -c '' >/dev/null 2>&1; then
        _setup_make_venv
    elif ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        _setup_fail "$ROOT/.venv has $("$PYTHON" --version), and distcurv needs Python >= 3.11." \
            "Remove that folder and run this again."
    fi
    fingerprint="$(_setup_fingerprint)"
    for extra in "$@"; do
        if [ "$(cat "$ROOT/.venv/distcurv-$extra.stamp" 2>/dev/null)" != "$fingerprint" ]; then
            missing+=("$extra")
        fi
    done
    if [ "${#missing[@]}" -eq 0 ]; then
        return 0
    fi
    joined="$(IFS=,; printf '%s' "${missing[*]}")"
    printf 'set-up: installing distcurv[%s] (the first time this takes some minutes)\n' "$joined" >&2
    "$PYTHON" -m pip install --quiet --disable-pip-version-check \
        --constraint "$ROOT/launch/constraints.txt" --editable "$ROOT[$joined]" ||
        _setup_fail "pip could not install distcurv[$joined]; its message is above."
    # Written last: an interrupted installation is done again.
    for extra in "${missing[@]}"; do
        printf '%s\n' "$fingerprint" >"$ROOT/.venv/distcurv-$extra.stamp"
    done
}
