"""``python -m tools.verify``: the same as ``python -m pera_kernels verify``."""

import sys

from pera_kernels.verify.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
