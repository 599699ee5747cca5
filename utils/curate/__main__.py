"""`python -m utils.curate`."""

import sys

from utils.curate.command import main

if __name__ == "__main__":
    sys.exit(main())
