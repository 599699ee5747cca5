"""`python -m exps.reproduce`."""

import sys

from exps.reproduce.command import main

if __name__ == "__main__":
    sys.exit(main())
