"""The architecture, read from the sources: who imports whom, who may touch which library, who may print."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastsrgan"

# A module imports from lower layers and, within its layer, from lines above its own. One line: these do not know of
# each other. A package (report) is one module.
LAYERS = {
    0: [
        "_version",
        "errors interrupts startup temporary units",
        "activations rearranged forms",
        "doubling spectral winograd",
        "normed",
        "fused",
        "geometry layers backend losses critic_convs runtime config ranks crew workers",
        "networks compiled",
    ],
    1: [
        "step critic_step",
        "precision",
        "voxel_stream modelfile remote dicom_header store_schema",
        "store_files store_codec",
        "nifti_check keras_h5 store tiles",
        "windows slabs region tile_network",
        "images encode store_writer adders",
        "stitch",
        "resample intensity metrics components checkpoint optimise schedule board",
        "table trainlog panels template dicom",
        "resample_sitk any_image extras distances grids",
        "image_list bids_names output_place",
        "blocks",
    ],
    2: [
        "patch_grid",
        "pool sweep interpolated",
        "degrade engine weights deviation memory_plan averaged",
        "anytime",
        "infer_ways infer_settings",
        "split",
        "resident dali_feed",
        "feed",
        "shuffle",
    ],
    3: [
        "convert infer report pair validate",
        "infer_job run_state error_map",
        "cohort evaluate room",
        "infer_files evaluate_cohort",
        "bids",
    ],
    4: [
        "snapshots trial doctor compat viewer",
        "loop",
        "train",
        "demo job",
        "study_data study_paper study_figure",
        "study_cells study_curves",
        "study_panels study_output",
        "study",
    ],
    5: ["console", "cli_infer cli_train", "cli_job cli_evaluate cli_report cli_study", "cli", "__init__ __main__"],
}
# Libraries that one place knows; the others get arrays and plain values from it.
ONLY = {
    "nibabel": {"images", "nifti_check"},
    "zarr": {"remote", "store_codec", "store_files"},
    "numcodecs": set(),
    "tensorstore": {"store_codec"},
    "fsspec": {"remote"},
    "h5py": {"keras_h5"},
    "safetensors": {"modelfile"},
    "cupy": {"backend"},
    "nvidia": {"dali_feed"},
    "yaml": {"config"},
    "rich": {"console"},
    "pydicom": {"dicom", "dicom_header"},
    "SimpleITK": {"resample_sitk"},
    "matplotlib": {"report", "error_map", "study_figure"},
}
NEVER = {"tensorflow", "keras", "pickle", "requests", "nilearn"}  # nilearn's files are read, its code is not run
SPEAKS = {
    "cli",
    "cli_evaluate",
    "cli_infer",
    "cli_report",
    "cli_study",
    "cli_train",
    "cli_job",
    "console",
    "interrupts",
    "startup",
    "__main__",
}  # print, sys.exit, argv
OPTIONAL = ("cupy", "nvidia", "tensorstore", "s3fs", "pydicom", "SimpleITK", "monai", "torchio")
HEAVY = (*OPTIONAL, "nilearn", "sklearn", "pandas", "matplotlib", "zarr", "torch", "scipy", "nibabel")
DISTRIBUTIONS = {"yaml": "pyyaml"}  # where the import is not called like the distribution

RANK = {
    name: (layer, line) for layer, lines in LAYERS.items() for line, names in enumerate(lines) for name in names.split()
}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """fastsrgan/stitch.py -> stitch, fastsrgan/report/planes.py -> report."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


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
            found |= {f"{base}.{alias.name}" for alias in node.names} if base == "fastsrgan" else {base}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                found.add(str(node.args[0].value))
    return found


@pytest.fixture(scope="module")
def imports() -> dict[Path, set[str]]:
    return {path: imports_of(path, ast.parse(path.read_text(encoding="utf8"))) for path in SOURCES}


def test_every_module_has_its_place():
    names = {module_of(path) for path in SOURCES}
    assert names <= set(RANK), f"not in LAYERS: {sorted(names - set(RANK))}"
    listed = [name for lines in LAYERS.values() for line in lines for name in line.split()]
    assert len(listed) == len(set(listed)), "a module is listed twice"


def test_imports_go_down(imports):
    wrong = []
    for path, names in imports.items():
        me = module_of(path)
        for name in names:
            parts = name.split(".")
            if parts[0] != "fastsrgan" or me not in RANK:
                continue
            # ``from fastsrgan import __version__`` asks the package itself.
            other = parts[1] if len(parts) > 1 and parts[1] in RANK else "__init__"
            if other != me and not RANK[other] < RANK[me]:
                wrong.append(f"{path.relative_to(ROOT)} {RANK[me]} imports {other} {RANK[other]}")
    assert not wrong, "\n".join(wrong)


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
        if module_of(path) not in SPEAKS:
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
