"""The structure of the code, as docs/architecture.md draws it: who may import whom, no circles, nothing oversized."""

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("ControlNet", "compress", "convs", "models", "utils", "exps")
MAY_IMPORT = {
    "main": {"models", "compress", "exps.report", "utils"},  # at its end a run writes its page
    "exps": {"compress", "models", "exps.report", "utils"},  # it starts main.py and compress/run.py as commands
    "exps.report": {"compress", "utils"},  # so that main.py may import it: neither models nor the rest of exps
    "compress": {"ControlNet", "utils"},
    "models": {"convs", "utils"},
    "ControlNet": set(),
    "convs": set(),
    "utils": set(),
}
LONGEST_FILE, LONGEST_FUNCTION, MOST_METHODS = 350, 60, 20
WORTH_IT = "longer than usual:"
"""A comment with these words, in the file, says why a file, function or class exceeds the limits."""

SOURCES = {path.relative_to(ROOT).as_posix(): path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
SOURCES["main.py"] = ROOT / "main.py"
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}


def room_of(module: str) -> str:
    first, second = [*module.split("."), ""][:2]
    return f"{first}.{second}" if f"{first}.{second}" in MAY_IMPORT else first


def module_name(file: str) -> str:
    return file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


MODULES = {module_name(file) for file in SOURCES}


def project_module(name: str) -> str | None:
    """The project's module that `name` is, or is a name of; None for a library."""
    if room_of(name) not in MAY_IMPORT:
        return None
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def imports(file: str) -> set[str]:
    """Modules of the project that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {module for name in names if (module := project_module(name))} - {module_name(file)}


IMPORTS = {file: imports(file) for file in SOURCES}


def test_each_room_imports_only_those_that_it_may():
    wrong = []
    for file, imported in IMPORTS.items():
        own = room_of(module_name(file))
        wrong += [f"{file}: {m}" for m in sorted(imported) if room_of(m) not in {own, *MAY_IMPORT[own]}]
    assert not wrong


def test_no_circles_between_files():
    packages = {module_name(file) for file in SOURCES if file.endswith("__init__.py")}
    graph = {}
    for file, imported in IMPORTS.items():  # a package is imported before the modules in it: that is no circle
        module = module_name(file)
        graph[module] = {other for other in imported if not (other in packages and module.startswith(other + "."))}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the files


NEED_TORCHVISION = {"torchvision", "pytorch_lightning", "timm"}
"""Libraries that import torchvision, whose import fails beside a torch of another build (`torchvision_compat`)."""


def test_torchvision_is_imported_after_its_compat_module():
    """The compat module comes first in each such file, or in the function that imports the library."""
    wrong = []
    for file, tree in TREES.items():
        scopes = [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))]
        compat = {}  # scope -> first line from which the compat module is there
        for scope in scopes:
            lines = [line for name, line in library_imports(scope) if name == "torchvision_compat"]
            compat[scope] = min(lines, default=float("inf"))
        for scope in scopes:
            first = (
                compat[scope]
                if scope is tree
                else min(compat[scope], 0 if compat[tree] < float("inf") else float("inf"))
            )
            wrong += [
                f"{file}:{line}: {name}"
                for name, line in library_imports(scope)
                if name in NEED_TORCHVISION and line < first
            ]
    assert not wrong


def library_imports(scope: ast.AST) -> list[tuple[str, int]]:
    """(library, line) of the imports in a module or function, without those in functions inside it."""
    found, waiting = [], list(ast.iter_child_nodes(scope))
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found += [(room_of(alias.name), node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.append((room_of(node.module), node.lineno))
        elif not isinstance(node, ast.FunctionDef):
            waiting += ast.iter_child_nodes(node)
    return found


def test_nothing_is_oversized():
    oversized = []
    for file, tree in TREES.items():
        text = SOURCES[file].read_text(encoding="utf-8")
        if WORTH_IT in text:
            continue
        if (lines := text.count("\n")) > LONGEST_FILE:
            oversized.append(f"{file}: {lines} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (lines := node.end_lineno - node.lineno + 1) > LONGEST_FUNCTION:
                oversized.append(f"{file}, {node.name}: {lines} lines")
            elif isinstance(node, ast.ClassDef):
                methods = sum(isinstance(member, ast.FunctionDef) for member in node.body)
                if methods > MOST_METHODS:
                    oversized.append(f"{file}, class {node.name}: {methods} methods")
    assert not oversized


MOST = {
    "main": (323, 1),
    "exps": (3176, 19),
    "compress": (5992, 33),
    "models": (4972, 43),
    "convs": (670, 6),
    "ControlNet": (4255, 31),
    "utils": (6460, 37),
}
"""(lines, files) of each package.  These numbers only go down: a package that has to grow makes room in itself first.
`python -m tests.test_house` prints the table for today's code: 3 % above its lines, and its files."""


def sizes() -> dict[str, tuple[int, int]]:
    lines = {package: [] for package in MOST}
    for file, path in SOURCES.items():
        lines[module_name(file).partition(".")[0]].append(path.read_text(encoding="utf-8").count("\n"))
    return {package: (sum(of_files), len(of_files)) for package, of_files in lines.items()}


def test_no_package_grows():
    now = sizes()
    grown = {name: now[name] for name, most in MOST.items() if now[name][0] > most[0] or now[name][1] > most[1]}
    assert not grown, f"(lines, files): {grown}, where at most {MOST} are allowed"


if __name__ == "__main__":
    for package, (lines, files) in sizes().items():
        print(f'    "{package}": ({round(1.03 * lines + 0.5)}, {files}),')
