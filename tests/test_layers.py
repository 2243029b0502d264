"""The architecture, read from the sources: who imports whom, who may touch which library, who may print; its size."""

import ast
import functools
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastsrgan"

# A package, or a module beside them, imports only what stands above it. Inside a package: no cycles.
ORDER = (
    *("_version", "errors", "losses", "core", "config", "volume", "model", "doctor", "observation", "io", "pictures"),
    *("store", "data", "evaluate", "convert", "infer", "train", "compat", "report", "demo", "study", "cli"),
    *("infer_files", "evaluate_cohort", "viewer"),  # documented paths of names that live elsewhere
    *("__init__", "__main__"),
)
# What holds; of a file the aim is 500 lines.
MOST = {"root": 10, "folder": 15, "lines": 530, "files in a chain": 16, "packages in a chain": 12}
# Libraries that one place knows; the others get arrays and plain values from it.
ONLY = {
    "nibabel": {"io.nifti", "io.nifti_header"},
    "zarr": {"store.remote", "store.codec", "store.files"},
    "numcodecs": set(),
    "tensorstore": {"store.codec"},
    "fsspec": {"store.remote"},
    "h5py": {"model.keras"},
    "safetensors": {"model.safetensors"},
    "cupy": {"core.kernels"},
    "nvidia": {"data.dali"},
    "yaml": {"config"},
    "rich": {"cli.console"},
    "pydicom": {"io.dicom", "io.dicom_header"},
    "SimpleITK": {"volume.resample_sitk", "io.formats"},
    "matplotlib": {"pictures.figure", "pictures.error_map", "pictures.bland_altman", "study.plots"},
}
NEVER = {"tensorflow", "keras", "pickle", "requests", "nilearn"}  # nilearn's files are read, its code is not run
SPEAKS = {"cli", "core.signals", "__main__"}  # print, sys.exit, argv
OPTIONAL = ("cupy", "nvidia", "tensorstore", "s3fs", "pydicom", "SimpleITK", "monai", "torchio")
HEAVY = (*OPTIONAL, "nilearn", "sklearn", "pandas", "matplotlib", "zarr", "torch", "scipy", "nibabel")
DISTRIBUTIONS = {"yaml": "pyyaml"}  # where the import is not called like the distribution

SOURCES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """fastsrgan/infer/stitch.py -> infer.stitch, fastsrgan/infer/__init__.py -> infer."""
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__")


def package_of(module: str) -> str:
    """infer.stitch -> infer."""
    return module.partition(".")[0]


MODULES = {module_of(path): path for path in SOURCES}


def imports_of(path: Path, tree: ast.AST) -> set[str]:
    """Absolute dotted names of all that a file imports, also inside functions and through ``import_module``."""
    package = ["fastsrgan", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            inside = {
                alias.name for alias in node.names if f"{base}.{alias.name}".removeprefix("fastsrgan.") in MODULES
            }
            found |= {f"{base}.{name}" for name in inside}
            found |= {base} if len(inside) < len(node.names) else set()
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                found.add(str(node.args[0].value))
    return found


@pytest.fixture(scope="module")
def imports() -> dict[Path, set[str]]:
    return {path: imports_of(path, ast.parse(path.read_text(encoding="utf8"))) for path in SOURCES}


def graph_of(imports: dict[Path, set[str]]) -> dict[str, set[str]]:
    """Module -> the modules of fastsrgan that it imports, also inside functions."""
    graph = {}
    for path, names in imports.items():
        below = {name.removeprefix("fastsrgan.") for name in names if name.startswith("fastsrgan")}
        # ``from fastsrgan import __version__`` asks the package itself.
        graph[module_of(path)] = {name if name in MODULES else "__init__" for name in below} - {module_of(path)}
    return graph


def longest(graph: dict[str, set[str]]) -> list[str]:
    """The longest chain of a graph. AssertionError at a cycle, which it names."""

    @functools.cache
    def below(name: str) -> list[str]:
        assert name not in open_, f"a cycle: {' > '.join([*open_[open_.index(name) :], name])}"
        open_.append(name)
        best = max((below(other) for other in sorted(graph.get(name, ()))), key=len, default=[])
        open_.pop()
        return [name, *best]

    open_: list[str] = []
    return max((below(name) for name in sorted(graph)), key=len)


def by_package(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same of packages."""
    packages: dict[str, set[str]] = {}
    for name, others in graph.items():
        packages.setdefault(package_of(name), set()).update(map(package_of, others))
    return {name: others - {name} for name, others in packages.items()}


def test_every_package_has_its_place():
    assert {package_of(name) for name in MODULES} == set(ORDER)
    assert len(ORDER) == len(set(ORDER))


def test_packages_import_only_what_stands_above_them(imports):
    wrong = [
        f"{name} imports {other}"
        for name, others in by_package(graph_of(imports)).items()
        for other in others
        if ORDER.index(other) > ORDER.index(name)
    ]
    assert not wrong, "\n".join(wrong)


def test_chains_are_short_and_there_is_no_cycle(imports):
    graph = graph_of(imports)
    chain, packages = longest(graph), longest(by_package(graph))
    assert len(chain) <= MOST["files in a chain"], " > ".join(chain)
    assert len(packages) <= MOST["packages in a chain"], " > ".join(packages)


@pytest.mark.parametrize("folder", ["bench", "tools", "tests"])
def test_what_stands_beside_the_package_has_no_cycle(folder):
    """Modules of a folder import one another as ``bench.step``, or, in scripts that run from it, as ``reliability``."""
    paths = {path.stem: path for path in (ROOT / folder).glob("*.py")}
    graph: dict[str, set[str]] = {}
    for name, path in paths.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            full: list[str] = []
            if isinstance(node, ast.Import):
                full = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                full = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            graph[name] |= {f.removeprefix(f"{folder}.") for f in full} & paths.keys() - {name}
    assert any(graph.values())
    longest(graph)


def test_folders_and_files_are_small():
    folders = [PACKAGE, *sorted({path.parent for path in SOURCES} - {PACKAGE})]
    for folder in folders:
        most = MOST["root" if folder == PACKAGE else "folder"]
        assert len(list(folder.glob("*.py"))) <= most, folder
    for path in SOURCES:
        assert len(path.read_text(encoding="utf8").splitlines()) <= MOST["lines"], path


def test_a_cycle_and_a_chain_are_seen():
    with pytest.raises(AssertionError, match="a cycle: b > c > b"):
        longest({"a": {"b"}, "b": {"c"}, "c": {"b"}})
    assert longest({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == ["a", "b", "c"]


def test_each_library_is_known_to_its_place_only(imports):
    wrong = []
    for path, names in imports.items():
        for name in names:
            library = name.split(".")[0]
            if library in NEVER or module_of(path) not in ONLY.get(library, {module_of(path)}):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def speaks(node: ast.AST) -> bool:
    """Whether this is a print, an exit, or a look at the command line."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id in ("print", "exit", "quit", "input", "SystemExit")
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return (node.value.id, node.attr) in {("sys", "exit"), ("sys", "argv"), ("sys", "stdout"), ("sys", "stderr")}
    if isinstance(node, ast.ImportFrom) and node.module == "sys":
        return any(alias.name in ("exit", "argv", "stdout", "stderr") for alias in node.names)
    return False


def test_only_the_command_line_prints_exits_and_reads_arguments():
    wrong = []
    for path in SOURCES:
        if not {module_of(path), package_of(module_of(path))} & SPEAKS:
            tree = ast.parse(path.read_text(encoding="utf8"))
            wrong += [f"{path.relative_to(ROOT)}:{node.lineno}" for node in ast.walk(tree) if speaks(node)]
    assert not wrong, "\n".join(wrong)


def test_the_checks_see_what_they_look_for():
    lines = ["import sys", "from sys import argv", "print(1)", "sys.exit(2)"]
    tree = ast.parse("\n".join([*lines, "def f():", "    import_module('cupy')", "    from . import cli"]))
    assert sum(map(speaks, ast.walk(tree))) == 3
    assert imports_of(PACKAGE / "errors.py", tree) == {"sys", "cupy", "fastsrgan.cli"}


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_loads_nothing_heavy():
    program = f"import sys, fastsrgan; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert run(program) == "[]"


def test_what_an_inference_needs_after_its_tiles_or_not_at_all_does_not_delay_the_first():
    """A tenth of a second or more each."""
    late = (
        "scipy.ndimage",
        "scipy.stats",
        "zarr",
        "h5py",
        "matplotlib",
        "torch._dynamo",
        "torch._inductor",
        "fastsrgan.train",
    )
    program = f"import sys, fastsrgan.infer.files; print([m for m in {late!r} if m in sys.modules])"
    assert run(program) == "[]"


def test_every_module_imports_without_the_optional_packages():
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in SOURCES]
    program = f"""
import importlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
for name in {modules!r}:
    importlib.import_module(name)
"""
    run(program)


def test_dependencies_are_what_is_imported(imports):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]

    def names(requirements: list[str]) -> set[str]:
        return {r.split(">")[0].split("[")[0].strip().lower() for r in requirements}

    core = names(project["dependencies"])
    extras = names([r for group in project["optional-dependencies"].values() for r in group])
    used = {name.split(".")[0] for found in imports.values() for name in found} - {"fastsrgan"}
    used = {DISTRIBUTIONS.get(u, u).lower() for u in used if u not in sys.stdlib_module_names}
    assert used - core <= extras | {"cupy", "nvidia"}, "imported, but nowhere declared"
    assert core - used == {"nilearn"}, "declared, but not imported"  # nilearn carries data
