"""A sweep as an array of SLURM jobs, by submitit, which is optional (`pip install submitit`)."""

import argparse
import ast
import os
import sys
from pathlib import Path

from exps.grid import Points, watch
from exps.runs import ROOT
from utils.errors import UserError

POLL = 10.0
"""Seconds between two looks at the jobs."""


def submit(options: argparse.Namespace, output: Path, points: Points) -> int:
    """Start the same sweep `options.submit` times as one array and wait for it.  Returns the exit code.

    options: the command line's of `exps.pareto`; output: the sweep's folder; points: what it has.  The jobs share the
    runs; the last one writes the page.  When this process is stopped, the jobs go on.  Raises UserError without
    submitit or for wrong parameters.
    """
    try:
        import submitit
    except ModuleNotFoundError:
        raise UserError("--submit needs submitit: pip install submitit.") from None
    parameters = dict(_parameter(text) for text in options.slurm)
    words = [sys.executable, "-m", "exps.pareto", str(options.file), "--output", str(output)]
    words += ["--jobs", str(options.jobs)]
    for name in ("seeds", "budgets", "forms", "methods"):
        if values := getattr(options, name):
            words += [f"--{name}", ",".join(map(str, values))]
    executor = submitit.AutoExecutor(folder=output / "slurm")
    executor.update_parameters(name="escort-sweep", **parameters)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    task = submitit.helpers.CommandFunction(words, cwd=Path.cwd(), env={**os.environ, "PYTHONPATH": path})
    with executor.batch():
        jobs = [executor.submit(task) for _ in range(options.submit)]
    print(f"submitted as {', '.join(str(job.job_id) for job in jobs)}; logs in {output}/slurm", flush=True)
    watch(points, lambda: not all(job.done() for job in jobs), POLL)
    failed = [f"job {job.job_id}: {error}" for job in jobs if (error := job.exception()) is not None]
    if failed:
        print(*failed, sep="\n", file=sys.stderr)
    return 1 if failed else 0


def _parameter(text: str) -> tuple[str, object]:
    """ "timeout_min=600" -> ("timeout_min", 600)."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UserError(f"--slurm {text}: give KEY=VALUE, such as timeout_min=600.")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
