"""Methods side by side, each with real exemplars alone and with a config's mix of real ones and prompts, at one budget.

    python -m exps.compare exps/cifar10.json [--methods icarl,der] [--only real|mix] [--jobs 2] [key=value ...]

The config names everything but the method.  Each run is main.py's, in <output>/<method>-<real or mix>; what is finished
is reused, what was killed goes on.  A method that keeps no exemplars runs once.  The table, in Markdown, has top-1
accuracy in percent, mean ± standard deviation over the config's seeds; it goes to <output>/table.md too.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from utils import log as logs
from utils.config.schema import read_json
from utils.errors import UserError
from utils.results import report

EXPS = Path(__file__).resolve().parent.parent / "exps"
MAIN = EXPS.parent / "main.py"
MEMORIES = ("real", "mix")


class Run(NamedTuple):
    """One run of main.py: `memory` is one of MEMORIES, `folder` its results', `overrides` its own."""

    method: str
    memory: str
    folder: Path
    overrides: tuple[str, ...]


def all_methods() -> list[str]:
    """Those that have an example config, which all have."""
    return sorted(file.stem for file in EXPS.glob("*.json") if read_json(file).get("model_name") == file.stem)


def real_only(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Overrides that spend a config's budget on real exemplars alone."""
    return (f"real_per_class={int(config['memory_per_class'])}", "syn_per_class=0", "augmentation_prob=0")


def runs(config: Mapping[str, Any], methods: Sequence[str], output: Path) -> dict[str, list[Run]]:
    """Every method's two runs, by memory."""
    overrides = {"real": real_only(config), "mix": ()}
    return {
        memory: [Run(method, memory, output / f"{method}-{memory}", overrides[memory]) for method in methods]
        for memory in MEMORIES
    }


def finished(run: Run, seeds: Sequence[int]) -> Mapping[str, Any] | None:
    """A run's results.json, if all its seeds are in it."""
    try:
        results = report.load_results(run.folder)
    except UserError:
        return None
    return results if set(seeds) <= set(results["summary"]["seeds"]) else None


def keeps_exemplars(results: Mapping[str, Any]) -> bool:
    return results["summary"]["units"]["mean"] > 0


def carry_out(todo: Sequence[Run], config: Path, overrides: Sequence[str], jobs: int) -> dict[Run, str]:
    """Run main.py for each, `jobs` at a time, sharing the cores equally.  Returns the last words of what failed."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {"OMP_NUM_THREADS": str(max(1, cores // jobs)), **os.environ}

    def carry_out_one(run: Run) -> subprocess.CompletedProcess:
        command = [sys.executable, str(MAIN), "--config", str(config), *overrides, *run.overrides]
        command += [f"model_name={run.method}", f"output_dir={run.folder}"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    failed = {}
    with ThreadPoolExecutor(jobs) as pool, logs.progress(len(todo), "runs") as bar:
        futures = {pool.submit(carry_out_one, run): run for run in todo}
        try:
            for future in as_completed(futures):
                run, outcome = futures[future], future.result()
                if outcome.returncode:
                    failed[run] = (outcome.stderr.strip().splitlines() or ["no message"])[-1]
                bar.set_postfix_str(f"{run.method}, {run.memory}", refresh=False)
                bar.update()
        except KeyboardInterrupt:  # the runs have had it too, and stop; those that wait need not begin
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def table(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Markdown.  results: memory -> method -> results.json.  A classifier by nearest means has a row of its own."""
    columns = ("average", "forgetting", "s")
    header = ["method", *(f"{memory}: {column}" for memory in MEMORIES for column in columns)]
    lines: dict[str, dict[str, tuple]] = {}
    for memory, of_memory in results.items():
        for name, (summary, classifier) in report.curves(of_memory).items():
            metrics = summary[classifier]
            values = (metrics["average_incremental_accuracy"], metrics["forgetting"], summary["seconds"])
            lines.setdefault(name, {})[memory] = values
    rows = [header, ["---"] * len(header)]
    for name in sorted(lines):
        row = [name]
        for memory in MEMORIES:
            if (values := lines[name].get(memory)) is None:
                row += [""] * len(columns)
                continue
            row += [_cell(value, digits) for value, digits in zip(values, (1, 1, 0), strict=True)]
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(value: Mapping[str, float] | None, digits: int) -> str:
    if value is None:
        return "-"
    spread = f" ± {value['std']:.{digits}f}" if digits and value["std"] > 0 else ""
    return f"{value['mean']:,.{digits}f}{spread}"


def compare(options: argparse.Namespace) -> int:
    """What the command line asks for.  Returns the exit code."""
    config = read_json(options.config)
    seeds = config.get("seed", [1993])
    output = options.output or Path("outputs") / options.config.stem
    methods = options.methods.split(",") if options.methods else all_methods()
    if unknown := sorted(set(methods) - set(all_methods())):
        raise UserError(f"--methods: {', '.join(unknown)} is not among {', '.join(all_methods())}.")
    by_memory = runs(config, methods, output)
    failed: dict[Run, str] = {}
    results: dict[str, dict[str, Mapping]] = {memory: {} for memory in MEMORIES}
    for memory, of_memory in by_memory.items():
        if options.only in (None, memory):
            without = {method for method, of_real in results["real"].items() if not keeps_exemplars(of_real)}
            wanted = [run for run in of_memory if memory == "real" or run.method not in without]
            todo = [run for run in wanted if finished(run, seeds) is None]
            failed |= carry_out(todo, options.config, options.overrides, options.jobs)
        for run in of_memory:
            if (of_run := finished(run, seeds)) is not None:
                results[memory][run.method] = of_run
    if any(results.values()):
        text = table(results)
        print(text)
        output.mkdir(parents=True, exist_ok=True)
        report.write_text(output / "table.md", text + "\n")
    for run, words in failed.items():
        print(f"{run.method}, {run.memory}: {words}", file=sys.stderr)
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command.  Returns its exit code: 0 done, 1 some runs failed (listed), 2 it is wrong, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m exps.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="a JSON config, such as exps/cifar10.json")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a key of the config in all runs")
    parser.add_argument("--methods", help="separated by commas (default: all)")
    parser.add_argument("--only", choices=MEMORIES, help="carry out one kind of runs; the table has what is there")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: outputs/<name of the config>")
    try:
        options = parser.parse_intermixed_args(argv)
    except SystemExit as leave:  # argparse has said what is wrong
        return int(leave.code or 0)
    logs.tolerate_odd_names()
    try:
        return compare(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where it was", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
