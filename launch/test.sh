#!/usr/bin/env bash
# From a fresh checkout to a test run.  Arguments are passed on to pytest, e.g. `-m slow`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
ensure_environment demo test
cd "$ROOT"
# Many tests start several processes: one thread in each is faster than a fight over the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" -m pytest "$@"
