"""Makes ``python -m distcurv`` the same as the command ``distcurv``."""

from __future__ import annotations

import sys

from distcurv.cli import main

if __name__ == "__main__":
    sys.exit(main())
