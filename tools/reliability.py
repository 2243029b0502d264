"""``python tools/reliability.py``: docs/reliability.md from the tests that are marked ``@pytest.mark.fault(n, ...)``.

The promises stand here, the tests are found in the sources, the runs of test-matrix, mutants, soak and fuzz are read
from bench/results/*/matrix.json, mutants.json, soak.json and fuzz.json.
``--check`` writes nothing and ends with 1 when the page is out of date or a row has no test.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import mutants  # noqa: E402

PAGE = ROOT / "docs" / "reliability.md"

# number -> (fault, what fastsrgan does, what is simulated and why)
FAULTS: dict[int, tuple[str, str, str]] = {
    1: ("truncated .nii or .nii.gz", "3, `truncated`", ""),
    2: (
        "wrong gzip or zlib checksum, all voxels readable",
        "3: every stream is read to its checksum, of .nii.gz, .mgz and packed NRRD and MetaImage",
        "",
    ),
    3: ("header claims 64 TiB", "3 before anything is allocated", ""),
    4: (
        "gzip bomb",
        "3 by size and ratio before unpacking; data behind the voxels: after one slice in NIfTI, after the same "
        "limit in other formats; `infer --max-voxels`",
        "",
    ),
    5: (
        "NaN or infinite voxels",
        "read as 0, as are numbers beyond 1e18, counted in a warning that reaches record and store; by `evaluate` in a "
        "note, also in its JSON",
        "",
    ),
    6: (
        "image all NaN, all zero or constant",
        "3 for all NaN, all zero and a constant below zero; one above zero stays constant",
        "",
    ),
    7: (
        "4-D, 5-D, RGB, complex",
        "a series of one is a volume; of many: 3, the hint names `infer --volume`, of a table's image that the series "
        "is to be split; others 3",
        "",
    ),
    8: ("sform and qform differ, or neither is set", "a warning names the choice; the record carries it", ""),
    9: ("left-handed, oblique, permuted axes", "the same result in world space, affine kept", ""),
    10: ("sheared affine", "kept, with a warning, in NIfTI, MGH, NRRD and MetaImage; a tilted DICOM series: 3", ""),
    11: (
        "voxel size zero, negative (where no sform stands beside it) or in microns",
        "3, or a warning with what is used; below 0.005 or above 50 mm a warning, of every file format",
        "",
    ),
    12: ("volume smaller than a patch", "padded, and cropped back to its shape", ""),
    13: ("label with fractions, NaN, another shape or place", "3 before a file is written", ""),
    14: (
        "table: columns, Base, missing files, leaks; BOM, separators",
        "3, all faults of rows at once with their lines, the first 50; a BOM, `;` and tabs are read",
        "",
    ),
    15: (
        "one bad file of many",
        "the others are done; summary; 6, or where none is done the code of the first. `convert` ends with 3 before it "
        "begins where a header, a label or a mask is bad; `train TABLE` converts the others, and trains when all are "
        "good",
        "",
    ),
    16: (
        "weights truncated, of another architecture, NaN",
        "4, names the layer and both shapes; `weights info` reads no values, and does not see NaN",
        "",
    ),
    17: ("pickle that runs code", "4, never executed", ""),
    18: ("HDF5 that declares 4 TiB or leads elsewhere", "4 before anything is read", ""),
    19: ("YAML that builds objects, unknown or repeated keys", "4, `did you mean`", ""),
    20: ("SIGKILL while converting", "`--resume` goes on; finished volumes stay; the bytes of an unbroken run", ""),
    21: ("SIGKILL while a snapshot is written", "the one before is intact and chosen", ""),
    22: ("resume after a kill", "every bit of an unbroken run on the CPU", ""),
    23: ("newest snapshot damaged", "checksum fails: the one before, with a warning", ""),
    24: (
        "full disk",
        "5, `no space left`; temporary files removed, last good kept; `convert`, `infer` and `train` ask for room "
        "before the work, and a store before each subject; `evaluate` keeps its figures where its pictures do not fit",
        "a limit on the size of a file (RLIMIT_FSIZE), told as such; calls that raise ENOSPC; the answer on free room",
    ),
    25: (
        "output folder not writable, or that of an output file missing",
        "2 or 5 before any work; a missing output folder is made, and for `train -dice`, `-mse` that of the file",
        "a file in its place, which stops root too",
    ),
    26: (
        "output exists",
        "kept without `--overwrite`, skipped under `--resume` where it is whole, by the commands that have them; "
        "tables and pictures that `study`, `evaluate` and `train -dice`, `-mse` made, and weights under `-sf`, are "
        "replaced by theirs, an HTML page with `--overwrite` by that of `report`; "
        "an input, or a file of another kind in their place: 2 "
        "before any work",
        "",
    ),
    27: (
        "two conversions into one store, two trainings into one run",
        "5 names the other process; a dead one's lock on the same host is taken over",
        "",
    ),
    28: ("readers while a store is written", "whole subjects only", ""),
    29: (
        "byte of a chunk flipped, or a manifest forged",
        "a chunk: named by subject, array, chunk; left out or 3; `verify`; a manifest: 4",
        "",
    ),
    30: ("chunk missing", "an error, never zeros", ""),
    31: (
        "object storage slow, failing, resetting",
        "tried again, bounded, then 5",
        "an S3 server and a proxy on loopback",
    ),
    32: (
        "store or snapshot of a newer format",
        "4; a store: `made by X, needs >= Y`; a snapshot: its format and the newest that is read, also "
        "where an older one would do, and `verify` of its run, 3, lists it",
        "",
    ),
    33: (
        "no device memory in inference",
        "smaller batches, the same result to rounding; 5 at one tile",
        "an allocator that raises",
    ),
    34: (
        "no device memory in training",
        "5 with peak and a batch that fits; `--auto-batch`",
        "an allocator that raises",
    ),
    35: ("no host memory", "planned from shapes; slabs on disk; refused over `--max-memory`", ""),
    36: ("loss or gradient not finite", "skipped and counted; 5 after several in a row, with the batch", ""),
    37: (
        "SIGTERM, SIGUSR1",
        "training, once its loop runs: snapshot at the step's end, 143; else cleaned up, 143",
        "",
    ),
    38: (
        "Ctrl-C once, twice",
        "130 after cleaning up; at once (of several ranks a second one counts 5 seconds after the first, since "
        "torchrun sends it twice)",
        "a pseudo-terminal",
    ),
    39: ("a rank dies", "the others end with its error; torchrun's restart resumes", "gloo ranks on the CPU"),
    40: ("ranks disagree", "4 before the first step", "gloo ranks on the CPU"),
    41: ("a worker of the feed dies or hangs", "an error with the subject", ""),
    42: (
        "no GPU, wrong CUDA",
        "CPU with one line; 5 for `--device cuda`; `doctor` tells",
        "probes that fail as broken CUDA",
    ),
    43: ("no network", "convert, verify, train, infer, evaluate, weights and doctor work, none asks for it", ""),
    44: ("small /dev/shm", "said, with `--shm-size`; not used", "the system's answer is replaced"),
    45: (
        "no stdin, no terminal, NO_COLOR, 80 columns",
        "without a terminal, and with TERM=dumb, plain lines without control codes; on a terminal NO_COLOR takes the "
        "colours away",
        "",
    ),
    46: ("clock, locales, blanks in paths", "the same bytes", ""),
    47: (
        "two processes that write one result, evaluation, study or set of pages",
        "one wins wholly; the other ends with 5 or, where it came to a result that was finished meanwhile, 2; what a "
        "dead process left is taken over, from another host too",
        "",
    ),
}

TOP = """# Reliability

Made by `python tools/reliability.py` from the tests, which make each fault themselves; a test says when this page is
out of date. `pytest -m fault` runs them. Codes are public: "Words and codes" in the [README](../README.md). An error
is one line on standard error, `error: WHAT: REASON (HINT)`: what came, what is allowed, what to do; after Ctrl-C it is
`error: interrupted`, after SIGTERM or SIGUSR1 `error: stopped: by` and its name; a training that one of these stops in
its loop has no error: its summary says so. SIGHUP, as of a terminal that is closed, ends a command as SIGKILL does.
Nothing half-written has its final name, but for files of a
subject in a store, which count once the manifest names it, what grows line by line (a run's log and the events for
TensorBoard), and the record of `job-model`, which holds its place while the image is computed.
What the commands say, word for word: [errors.md](errors.md). Untrusted files: [SECURITY.md](../SECURITY.md).

| # | fault | promised | tests | simulated |
|---|---|---|---|---|
"""

MATRIX = """
## Machines

`make test-matrix` runs the tests that touch arithmetic, signals, ranks and files once in each surrounding that
`python tools/test_matrix.py --list` names, and looks first whether it is in force, where a probe can tell. The table
holds the rows that were run, with the files they were run on, as they were then. What a machine lacks is said, and is
no pass.
"""

FUZZ = """
## Fuzzing

`make fuzz MINUTES=60` damages images, DICOM series, weights, snapshots, stores, tables, settings, datasets (BIDS), and
the records, scores, studies and logs of earlier calls, seeded and aware of their structure, and reads them with limits
on time and memory. A case may end in success or in a one-line error.
Where atheris is installed (`pip install atheris`) the damage is drawn from inputs that grow by the code they reach;
elsewhere by number alone. `ENGINE=plain` or `ENGINE=atheris` chooses.
`make test` reads the first cases of each target. Runs are listed as they ended; what each found was corrected since,
and is a test that says "Found as". The files that a finding names are called as they were then.
"""

MUTANTS = """
## Faults in the code

`make mutants MINUTES=30` puts small faults into a copy, one at a time, and runs the tests that are named beside each in
`tools/mutants/*.toml`: they must fail. What no test noticed is listed, and a change that is the same by law (the
program does what it did, so no test can tell) has its reason. A test of every run looks that each fault still stands
where the table says. What was noticed stays so while its entry in the table is the same.

How many faults that nobody wrote for the tests they notice is measured by rounds: somebody who reads the code, and
neither table nor tests, writes faults over all packages, and the tests that concern each are run, then wider ones. Of
the last round, 60 faults at commit c4f05b7, 58 were noticed (97 %). Ten of them turned out to stand in the table
already: of the 50 others 48 (96 %). The two that were missed have a law and stand in the table since.

What the laws cost: `bash .ci/run` of commit 375b100 ran 6,738 tests in 10 min 59 s on 2 cores of an AMD EPYC 25/17/1,
beside a demo; before the last two rounds it was 6,639 in 9 min 35 s on a machine of that kind.
Of commit bd7814c it ran 7,006 in 17 min 29 s with three other programs on those two cores; what it takes on quiet ones
was not measured since.
"""

SOAK = """
## Soak

`make soak MINUTES=20` converts, trains and infers on a small cohort; each job is killed with SIGKILL at random moments
and called again until it ends, and must then have every bit of an unbroken run (of inference: its images). Beside them
a process that is never killed trains and infers over and over: its memory (by more than 16 MiB), descriptors and
threads must not grow.
"""


def tests_of_rows(folder: Path) -> dict[int, list[str]]:
    """Row -> the tests that carry its number, as ``file::test``, from the sources."""
    found: dict[int, list[str]] = {n: [] for n in FAULTS}
    for path in sorted(folder.glob("test_*.py")):
        for name, node, text in _functions(path):
            for number in sorted(_numbers(node)):
                found[number].append(f"{path.stem}::{name}")
            if "REFUSED_ROWS" in text or "ACCEPTED_ROWS" in text:
                for number in sorted(_numbers_of_table(path, "REFUSED" if "REFUSED_ROWS" in text else "ACCEPTED")):
                    found[number].append(f"{path.stem}::{name}")
    return found


def _functions(path: Path) -> list[tuple[str, ast.FunctionDef, str]]:
    tree = ast.parse(path.read_text(encoding="utf8"))
    # pytest knows the tests of a class that others share (no Test in its name) by those.
    shared = {base.id: node.name for node in reversed(tree.body) if isinstance(node, ast.ClassDef)
              for base in node.bases if isinstance(base, ast.Name)}  # fmt: skip
    found = []
    for node in tree.body:
        for inner in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(inner, ast.FunctionDef) and inner.name.startswith("test"):
                name = inner.name
                if isinstance(node, ast.ClassDef):
                    name = f"{shared.get(node.name, node.name)}::{name}"
                found.append((name, inner, " ".join(ast.unparse(d) for d in inner.decorator_list)))
    return found


def _numbers(node: ast.FunctionDef) -> set[int]:
    """The rows in the marks of a test."""
    calls = [d for d in node.decorator_list if isinstance(d, ast.Call) and ast.unparse(d.func) == "pytest.mark.fault"]
    return {arg.value for call in calls for arg in call.args if isinstance(arg, ast.Constant)}


def _numbers_of_table(path: Path, name: str) -> set[int]:
    """The rows at the beginning of the keys of a table of cases, "3 claims 64 TiB"."""
    for node in ast.parse(path.read_text(encoding="utf8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name and isinstance(node.value, ast.Dict):
            return {int(key.value.split()[0]) for key in node.value.keys if isinstance(key, ast.Constant)}
    return set()


def page(tests: dict[int, list[str]]) -> str:
    """The whole page."""
    lines = []
    for number, (fault, promised, how) in FAULTS.items():
        names = "<br>".join(f"`{name}`" for name in tests[number]) or "none"
        lines.append(f"| {number} | {fault} | {promised} | {names} | {how} |")
    found = sorted((ROOT / "bench" / "results").glob("*/soak.json"))
    runs = [soaked(path) for path in found] or ["\nNo run is kept under `bench/results/` yet.\n"]
    fuzzed = [text for path in sorted((ROOT / "bench" / "results").glob("*/fuzz.json")) for text in fuzz_runs(path)]
    fuzzed = fuzzed or ["\nNo run is kept under `bench/results/` yet.\n"]
    tables = [matrix(path) for path in sorted((ROOT / "bench" / "results").glob("*/matrix.json"))]
    tables = tables or ["\nNo run is kept under `bench/results/` yet.\n"]
    put_in = [faults(path) for path in sorted((ROOT / "bench" / "results").glob("*/mutants.json"))]
    put_in = put_in or ["\nNo run is kept under `bench/results/` yet.\n"]
    parts = [TOP + "\n".join(lines) + "\n", MATRIX, *tables, MUTANTS, *put_in, FUZZ, *fuzzed, SOAK, *runs]
    return "".join(parts)


def faults(path: Path) -> str:
    """The faults that one machine put into the code."""
    found = mutants.read(path)
    commits = ", ".join(dict.fromkeys(map(commit_of, found.values())))
    return f"\n{path.parent.name}, {commits}:\n\n{mutants.report(mutants.table(), found)}"


def commit_of(run: dict[str, Any]) -> str:
    """The code that a figure was measured with; what was written down before commits were says so."""
    commit = run.get("commit") or run.get("provenance", {}).get("commit")
    return f"commit {commit}" if commit else "commit not kept"


def _tests(words: str) -> str:
    """A file of tests by its stem, one of its tests by its name as well."""
    file, colons, test = words.partition("::")
    return Path(file).stem + colons + test


def matrix(path: Path) -> str:
    """The surroundings of one machine as a table."""
    run = json.loads(path.read_text(encoding="utf8"))
    text = f"\n{run['cpu']}, {run['cores']} cores ({path.parent.name}):\n\n"
    text += "| surrounding | result | tests | skipped | seconds | processor seconds | commit |\n"
    text += "|---|---|---|---|---|---|---|\n"
    for name, row in run["rows"].items():
        result = row["result"] + (f": {row['reason']}" if "reason" in row else "")
        figures = [str(row.get(key, "")) for key in ("tests", "skipped", "seconds", "cpu_seconds")]
        if "files" in row:
            figures[0] += f" of {', '.join(map(_tests, row['files']))} alone"
        text += f"| {name} | {' | '.join([result, *figures, commit_of(row).removeprefix('commit ')])} |\n"
    return text


def fuzz_runs(path: Path) -> list[str]:
    """Each fuzzing run of a machine in a paragraph."""
    told = []
    for run in json.loads(path.read_text(encoding="utf8")):
        cases = ", ".join(f"{name} {count}" for name, count in run["cases"].items())
        spent = f"{run['minutes']:g} minutes, {run['cpu_minutes']:g} of them computing"
        where = f"\n{path.parent.name}, {commit_of(run)}, {run['engine']}"
        text = f"{where}: {sum(run['cases'].values())} cases in {spent} ({cases}); "
        told.append(text + f"{len(run['findings'])} findings.\n")
        told += [f"* {finding.splitlines()[0]}\n" for finding in list(run["findings"])[:20]]
    return told


def soaked(path: Path) -> str:
    """One soak run in a paragraph."""
    run = json.loads(path.read_text(encoding="utf8"))
    kills = ", ".join(f"{n} of {kind}" for kind, n in run["kills"].items())
    steady = run["steady"]
    text = f"\n{path.parent.name}, {commit_of(run)}: "
    text += f"{run['minutes_taken']} minutes, {run['rounds']} rounds, kills: {kills}; "
    text += f"{len(run['problems'])} problems.\n"
    if steady["enough"]:
        names = {"rss_mib": "MiB resident", "descriptors": "file descriptors", "threads": "threads"}
        told = "; ".join(f"{word} {steady[k]['early']:g} -> {steady[k]['late']:g}" for k, word in names.items())
        text += f"The process that was not killed, second to last quarter of {steady['turns']} turns: {told}.\n"
    else:
        text += f"The process that was not killed took {steady['turns']} turns: too few to judge growth by (8).\n"
    return text + "".join(f"* {problem}\n" for problem in run["problems"][:20])


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    tests = tests_of_rows(ROOT / "tests")
    missing = [n for n, names in tests.items() if not names]
    if missing:
        print(f"rows without a test: {missing}", file=sys.stderr)
    text = page(tests)
    if args.check:
        stale = not PAGE.exists() or PAGE.read_text(encoding="utf8") != text
        if stale:
            print(f"{PAGE} is out of date: python tools/reliability.py", file=sys.stderr)
        return int(stale or bool(missing))
    PAGE.write_text(text, encoding="utf8")
    return int(bool(missing))


if __name__ == "__main__":
    raise SystemExit(main())
