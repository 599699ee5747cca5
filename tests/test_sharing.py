"""compress/run.py in several processes, and killed: by torchrun, by SLURM's variables, by hand, by SIGKILL."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import main as training
from compress import plan, run, session
from compress.regenerate import Regenerator
from tests import little_run, processes
from tests.conftest import asked_for
from tests.folders import make_dataset
from tests.little_config import write_config
from tests.processes import REPOSITORY, free_port
from utils.data.paths import DatasetPaths

LABELS = ("apple pie", "crème", "sushi")
COPIES = 12 if asked_for("long") else 3
MADE = 9 * COPIES  # of nine images
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port")


def toy(folder: Path) -> DatasetPaths:
    return make_dataset(folder, LABELS, train=3, size=(48, 40), ending=".JPG")


@pytest.fixture
def paths(tmp_path):
    return toy(tmp_path / "shared")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, checkpoint):
    """What one process makes that nobody disturbs."""
    paths = toy(tmp_path_factory.mktemp("undisturbed"))
    (alone,) = processes.ranks("compress.run", arguments(paths, checkpoint), 1)
    assert alone.returncode == 0, alone.stderr
    assert f"copies: {MADE} made, 0 skipped, 0 failed" in alone.stdout
    return made(paths)


def arguments(paths, checkpoint, copies=COPIES) -> list[str]:
    return [*little_run.arguments(paths, checkpoint), "--seeds", str(copies)]


def together(paths, checkpoint, *options, copies=COPIES) -> list[subprocess.CompletedProcess]:
    """The command in two processes."""
    return processes.ranks("compress.run", [*arguments(paths, checkpoint, copies), *options])


def start(paths, checkpoint, *launcher, options=(), **variables) -> subprocess.Popen:
    """The command as a user types it, in processes of its own."""
    return subprocess.Popen(
        [sys.executable, *launcher, "compress/run.py", *arguments(paths, checkpoint), *options],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    """What the process prints until it ends well."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def made(paths: DatasetPaths) -> dict[str, bytes]:
    """Every file that is not the user's own, hidden ones too."""
    return {
        str(file.relative_to(paths.root)): file.read_bytes()
        for mode in ("edge_maps", "exemplars")
        for file in sorted(paths.folder(mode).rglob("*"))
        if file.is_file()
    }


def write(paths: DatasetPaths, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (paths.root / name).parent.mkdir(parents=True, exist_ok=True)
        (paths.root / name).write_bytes(content)


def wait_for_copies(paths, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if len(list(paths.folder("copies").rglob("*.jpg"))) >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"{count} copies were not made: {process.communicate()[1] if process.poll() else 'too slow'}")


def children(process: subprocess.Popen) -> list[int]:
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in found]


def test_torchruns_processes_make_the_tree_of_one(paths, checkpoint, tmp_path):
    """Of a form that needs no model: its processes start in half the time."""
    form = ("--form", "webp:10@20")
    out = finish(start(paths, checkpoint, *TORCHRUN, free_port(), options=form))
    assert out.count("copies: 9 made, 0 skipped, 0 failed") == 1  # one summary, and nothing made twice
    assert out.count("copies: 9 to make") == 1
    alone = toy(tmp_path / "alone")
    assert run.main([*arguments(alone, checkpoint), *form]) == 0
    assert little_run.tree(paths.root) == little_run.tree(alone.root)


def test_slurms_processes_make_the_tree_of_one(paths, checkpoint, undisturbed):
    """`srun --ntasks-per-node 2`, by the variables that it sets."""
    job = {
        "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0",
        "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "compress", "SLURM_JOB_ID": "4321", "SLURM_NODELIST": "127.0.0.1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "SLURM_PROCID": "{rank}", "SLURM_LOCALID": "{rank}",
    }  # fmt: skip
    tasks = processes.ranks("compress.run", arguments(paths, checkpoint), **job)
    assert [task.returncode for task in tasks] == [0, 0], tasks[0].stderr + tasks[1].stderr
    assert f"copies: {MADE} made, 0 skipped, 0 failed" in tasks[0].stdout
    assert tasks[1].stdout == ""
    assert made(paths) == undisturbed


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc to find torchrun's children")
def test_one_of_two_processes_is_killed(paths, checkpoint, undisturbed):
    process = start(paths, checkpoint, *TORCHRUN, free_port())
    wait_for_copies(paths, 4, process)
    os.kill(children(process)[-1], signal.SIGKILL)
    process.communicate(timeout=300)
    assert process.returncode != 0  # torchrun has ended the other one
    assert 4 <= len(list(paths.folder("copies").rglob("*.jpg"))) < MADE
    out = finish(start(paths, checkpoint, *TORCHRUN, free_port()))
    assert re.search(r"copies: \d+ made, [1-9]\d* skipped, 0 failed", out)
    assert made(paths) == undisturbed


@pytest.mark.long
def test_two_processes_verify_and_repair_and_replace(paths, checkpoint, undisturbed):
    """Looking at the disk is shared too."""
    write(paths, undisturbed)
    edge_map = next(paths.folder("kept").glob("*/*.edges"))
    copy = next(paths.folder("copies").glob("*/*_seed03.jpg"))
    edge_map.unlink()
    copy.write_bytes(copy.read_bytes()[:100])
    first, second = together(paths, checkpoint, "--verify")
    assert (first.returncode, second.returncode, second.stdout) == (1, 0, "")
    assert first.stdout.count(f"checked: 9 edge maps and {MADE} copies of 9 images") == 1
    assert f"{edge_map}: missing" in first.stdout
    assert f"{copy}: unreadable" in first.stdout
    first, second = together(paths, checkpoint, "--repair")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert f"copies: 1 made, {MADE - 1} skipped, 0 failed" in first.stdout
    assert made(paths) == undisturbed
    first, second = together(paths, checkpoint, "--replace", "--quality", "80")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert f"copies: {MADE} made, 0 skipped, 0 failed" in first.stdout
    first, second = together(paths, checkpoint)
    assert first.returncode == second.returncode == 2
    assert (first.stderr + second.stderr).count("quality 80 -> 75") == 1  # told once


def main(arguments: list[str]) -> int:
    """The command, or main.py for --config; tells how many images it looks at, and whether it makes copies."""

    def counting(function):
        def counted(records, images, *others, **options):
            print(f"{function.__name__} {len(images)}", file=sys.stderr)
            return function(records, images, *others, **options)

        return counted

    def making(self, *others):
        print("makes copies" if self.plan.copies_missing else "makes none", file=sys.stderr)
        return make(self, *others)

    plan.survey, session.verify = counting(plan.survey), counting(session.verify)
    make, Regenerator.run = Regenerator.run, making
    return (training if "--config" in arguments else run).main(arguments)


@pytest.mark.long
def test_looking_at_the_disk_is_dealt_out(paths, checkpoint, undisturbed):
    """Each process looks at its share of nine images: of three classes for the plan, and one by one to verify."""
    write(paths, undisturbed)
    looked = {}
    for option in ("--replace", "--verify"):
        ended = processes.ranks("tests.test_sharing", [*arguments(paths, checkpoint), option])
        assert [each.returncode for each in ended] == [0, 0]
        looked[option] = [re.findall(r"(survey|verify) (\d+)", each.stderr) for each in ended]
    assert looked["--replace"] == [[("survey", "6")], [("survey", "3")]]
    assert looked["--verify"] == [[("verify", "5")], [("verify", "4")]]


@pytest.mark.long
def test_two_processes_make_copies_on_demand(paths, checkpoint, tmp_path):
    trees = []
    for number in (1, 2):
        settings = f"--model {checkpoint} --resolution high --size 64 --steps 1 --batch-size 4"
        config = {
            **{"dataset": paths.dataset, "model_name": "icarl", "increment": 1, "seed": [1], "memory_per_class": 2},
            **{"real_per_class": 1, "syn_per_class": 2, "augmentations_per_image": 3, "init_lr": 1e-9, "lrate": 1e-9},
            **{"augmentation_scope": "exemplars", "regenerate": "on_demand", "regenerate_options": settings},
        }
        file = write_config(paths.data_dir, tmp_path / f"{number}", **config)
        first, *others = processes.ranks("tests.test_sharing", ["--config", file], number)
        assert [each.returncode for each in (first, *others)] == [0] * number, first.stderr
        assert all("makes copies" in each.stderr for each in (first, *others)), "each process makes its share"
        assert "copies on demand: 18 made" in first.stdout
        trees.append(made(paths))
        for mode in ("kept", "copies"):
            shutil.rmtree(paths.folder(mode))
    assert trees[0].keys() == trees[1].keys()
    assert trees[0] == trees[1]


def test_failures_of_all_processes_are_listed_once(paths, checkpoint):
    for label in LABELS:
        (paths.folder("train") / label / "text.jpg").write_text("no picture")
    first, second = together(paths, checkpoint, copies=1)
    assert (first.returncode, second.returncode, second.stdout) == (1, 0, "")
    assert "copies: 9 made, 0 skipped, 3 failed" in first.stdout
    assert first.stdout.count("text.jpg") == 3


@pytest.mark.slow(reason="25 runs, some minutes")
def test_sigkill_at_25_random_moments(paths, checkpoint, undisturbed):
    """Each moment lies between the plan and the end; a tree that is finished early is begun again."""
    moments = random.Random(0)
    killed = 0
    while killed < 25:
        process = start(paths, checkpoint)
        process.stdout.readline()  # the first line of the plan
        time.sleep(moments.uniform(0, 6))
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        for file in made(paths):
            if not Path(file).name.startswith(".") and not file.endswith(".json"):
                with Image.open(paths.root / file) as image:
                    image.load()  # raises where the picture is truncated
        if set(made(paths)) >= set(undisturbed):
            finish(start(paths, checkpoint))
            assert made(paths) == undisturbed
            for file in undisturbed:
                (paths.root / file).unlink()
    finish(start(paths, checkpoint))
    assert made(paths) == undisturbed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
