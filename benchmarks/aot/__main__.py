"""``python -m benchmarks.aot``"""

from __future__ import annotations

import sys

from benchmarks.aot.table import main

if __name__ == "__main__":
    sys.exit(main())
