"""Store a dataset's train images in an exemplar form, and regenerate copies from it.

    python compress/run.py --data-dir D --dataset Food101 --resolution high --seeds 5
    python compress/run.py --dataset Caltech256 --resolution low --seeds 0,3,7 --batch-size 8 --precision bf16
    torchrun --nproc-per-node 8 compress/run.py ...                # shares the work, as SLURM's srun does

Files that are on disk already are skipped, so a run that was stopped goes on when it is started again.
"""

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # `python compress/run.py`: Python would look into compress/ alone
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from compress import options
from utils import cli


def main(arguments: list[str] | None = None) -> int:
    """The command line.  Returns its exit code: 0 done, 1 some images failed, 2 wrong command, 130 interrupted."""
    return cli.run(lambda: command(arguments))


def command(arguments: list[str] | None) -> int:
    job, device = options.parse(arguments)
    from compress.session import run  # imports torch, which --help does not need

    return run(job, device)


if __name__ == "__main__":
    sys.exit(main())
