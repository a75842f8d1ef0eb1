"""``python -m tinytl_kernels`` is the command ``tinytl``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
