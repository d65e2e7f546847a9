#!/usr/bin/env bash
# From a fresh checkout to a running demo: makes .venv, installs the package, runs `distcurv demo`.
# Arguments are passed on, e.g. `bash launch/quickstart.sh --task charlm`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
ensure_environment demo
exec "$PYTHON" -m distcurv demo "$@"
