"""What a stranger gets: a wheel that works without the repository, a citation of this version, links that lead on."""

import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PACKAGES = ("ControlNet", "compress", "convs", "models", "utils", "exps")


def pinned(name: str) -> dict[str, str]:
    """Package -> version of a file of requirements."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return dict(line.split("==") for line in lines if "==" in line)


def test_dependencies_are_the_requirements():
    dependencies = {r.name: r for r in map(Requirement, PROJECT["dependencies"])}
    assert set(dependencies) == set(pinned("requirements.txt"))
    for name, version in pinned("requirements.txt").items():
        assert dependencies[name].specifier.contains(version), name


def test_extras_allow_the_tested_versions():
    extras = {r.name: r for extra in PROJECT["optional-dependencies"].values() for r in map(Requirement, extra)}
    for name, version in pinned("requirements-dev.txt").items():
        assert name not in extras or extras[name].specifier.contains(version), name


@pytest.mark.long
def test_a_wheel_is_all_that_is_needed(tmp_path):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("needs the repository")
    for name in tracked:  # a copy: a build leaves folders behind
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_bytes((ROOT / name).read_bytes())
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        "../wheel",
    ]
    subprocess.run(build, cwd=tmp_path / "source", check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheel").iterdir()
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    installed = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    needed = {name for name in tracked if name.startswith(tuple(f"{package}/" for package in PACKAGES))}
    assert needed | {"main.py", "torchvision_compat.py"} <= installed
    assert not [name for name in installed if name.startswith("tests")]

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def run(*words: str) -> str:
        environment = {"PYTHONPATH": str(site), "PATH": "", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, *words], cwd=elsewhere, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    command = "import sys; from importlib.metadata import entry_points as e; (s,) = e(name=sys.argv.pop(1)); "
    command += "sys.argv[0] = s.name; sys.exit(s.load()())"
    assert "icarl" in run("-c", command, "escort", "--list", "methods").split()
    config = run("-c", command, "escort", "--config", str(site / "exps" / "icarl.json"), "--show-config")
    assert json.loads(config)["model_name"] == "icarl"
    assert "--resolution" in run("-c", command, "escort-compress", "--help")

    # the digits, copies of the bundled model, and a training with a page
    run("-m", "utils.curate", "digits", "--data-dir", "data")
    where = ["--data-dir", "data", "--dataset", "MNIST", "--device", "cpu"]
    few = ["--resolution", "high", "--size", "64", "--steps", "1", "--seeds", "1", "--limit", "1", "--model", "tiny"]
    run("-c", command, "escort-compress", *where, *few)
    run("-c", "import sys; sys.path.insert(0, sys.argv[1]); import main; sys.exit(main.main(sys.argv[2:]))", str(site),
        "--config", str(site / "exps" / "finetune.json"), "dataset=MNIST", "data_dir=data", "init_cls=5", "increment=5",
        "convnet_type=resnet8", "init_epoch=1", "epochs=1", "milestones=[]", "init_milestones=[]", "device=cpu",
        "output_dir=out")  # fmt: skip
    assert (elsewhere / "out" / "report.html").stat().st_size > 1000
    assert "survey-inc10-icarl" in run("-m", "exps.reproduce", "--list")
    assert len(list((elsewhere / "data" / "MNIST" / "exemplars").rglob("*.jpg"))) == 10


def test_the_citation_is_of_this_version():
    citation = OmegaConf.to_container(OmegaConf.load(ROOT / "CITATION.cff"))
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    names = [
        f"{author['family-names']}, {author['given-names']}" for author in citation["preferred-citation"]["authors"]
    ]
    assert " and ".join(names) in (ROOT / "docs" / "citing.md").read_text(encoding="utf-8")
    assert f"{{{PROJECT['version']}}}" in (ROOT / "docs" / "citing.md").read_text(encoding="utf-8")


PAGES = sorted(path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "exps" / "README.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        if "://" in link or (name and name.startswith("mailto:")):
            continue
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert wrong == []


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
