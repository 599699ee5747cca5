"""`python -m exps.report`."""

import sys

from exps.report.command import main

if __name__ == "__main__":
    sys.exit(main())
