"""torchrun and the SLURM script as a user starts them. A minute each: FASTSRGAN_LONG_TESTS=1 runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cohort import losses, make_store, rows
from processes import on_ranks
from test_ddp import CONFIG, training

from fastsrgan.model import checkpoint

pytestmark = pytest.mark.timeout(1800)
slow = pytest.mark.skipif(not os.environ.get("FASTSRGAN_LONG_TESTS"), reason="slow: FASTSRGAN_LONG_TESTS=1 runs them")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("cohort"), train=5, test=3)


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory) -> Path:
    """A run of two ranks that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    on_ranks(training, 2, store, out / "run", CONFIG, out=out / "out")
    return out / "run"


SCRIPT = """
import os, signal, sys
from fastsrgan.cli import main as cli
from fastsrgan.train.gan import Models

original, count = Models.generator_update, iter(range(1, 1000))
def dying(self, *args, **kwargs):
    values = original(self, *args, **kwargs)
    if next(count) == 8 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return values
Models.generator_update = dying
sys.exit(cli.main(sys.argv[1:]))
"""


@slow
@pytest.mark.fault(39)
def test_torchrun_restarts_a_run_whose_rank_died_where_the_last_snapshot_is(store, whole, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf8")
    (tmp_path / "config.yaml").write_text(CONFIG.to_yaml(), encoding="utf8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", str(tmp_path / "script.py")]
    command += ["train", str(store), "-o", str(tmp_path / "run"), "--config", str(tmp_path / "config.yaml"), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    # Whichever comes first: rank 0 notices the death, or torchrun does and stops it.
    assert "left no error" in done.stderr or "stopped: by SIGTERM" in done.stderr
    assert "continuing" in done.stderr and "update 6" in done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf8"))
    assert summary["updates"] == 12 and summary["ranks"] == 2
    assert losses(tmp_path / "run") == losses(whole)
    assert json.loads(done.stdout)["updates"] == 12  # one rank speaks


# --- SLURM --------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent
STUBS = {  # what the batch script calls, with one machine for a cluster
    "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$STUBS/asked"; fi',
    "srun": """
while [[ "$1" == --* ]]; do shift; done
for ((i = 0; i < SLURM_NTASKS; i++)); do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids+=($!); done
echo "${pids[@]}" > "$STUBS/pids"
code=0
for p in "${pids[@]}"; do wait "$p"; c=$?; ((c > code)) && code=$c; done
exit $code""",
    "fastsrgan": f'exec {sys.executable} -m fastsrgan "$@"',
}


def slurm_job(place: Path) -> dict[str, str]:
    """The environment of a job of two tasks whose commands are ``STUBS``."""
    for name, body in STUBS.items():
        (place / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf8")
        (place / name).chmod(0o755)
    job = {"JOB_ID": 123, "NTASKS": 2, "NNODES": 1, "CPUS_PER_TASK": 1, "JOB_NODELIST": "here"}
    environment = {**os.environ, **{f"SLURM_{k}": str(v) for k, v in job.items()}, "STUBS": str(place)}
    return environment | {"PATH": f"{place}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


@pytest.mark.fault(37)
@pytest.mark.parametrize(
    ("before", "after", "code", "again"),
    [
        (None, 10, 143, True),
        (10, 10, 143, True),
        (None, None, 143, False),  # before the first step
        (10, None, 143, False),  # the same of a job that was requeued
        (10, 15, 143, False),
        (10, 10, 1, False),
    ],
)
def test_the_slurm_script_requeues_a_run_that_its_own_job_stopped(tmp_path, before, after, code, again):
    """The training is a stand-in that writes the summary, if it does, and ends with the code."""
    environment, run = slurm_job(tmp_path), tmp_path / "run"
    run.mkdir()
    if before:
        (run / "summary.json").write_text(json.dumps({"stopped": before, "updates": 3}), encoding="utf8")
    made = f"echo '{json.dumps({'stopped': after, 'updates': 6})}' > '{run}/summary.json'" if after else ":"
    (tmp_path / "fastsrgan").write_text(f"#!/bin/bash\n{made}\nexit {code}\n", encoding="utf8")
    command = ["bash", str(ROOT / "docs/slurm/train.sbatch"), "store", str(run)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (code, "")
    assert (tmp_path / "asked").exists() == again


@slow
@pytest.mark.fault(37)
def test_the_slurm_script_leaves_a_snapshot_before_the_time_limit_and_is_requeued(store, whole, tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG.to_yaml(), encoding="utf8")
    environment = slurm_job(tmp_path)
    run = tmp_path / "run"
    command = ["bash", str(ROOT / "docs/slurm/train.sbatch"), str(store), str(run)]
    command += ["--config", str(tmp_path / "config.yaml")]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not ((run / "log.jsonl").exists() and len(rows(run)) >= 3):
        time.sleep(0.05)
    for pid in (tmp_path / "pids").read_text(encoding="utf8").split():
        os.kill(int(pid), signal.SIGUSR1)  # as slurmstepd sends it to every task
    told = process.communicate(timeout=600)[1]
    assert process.returncode == 143, told
    assert (tmp_path / "asked").read_text(encoding="utf8").split() == ["requeue", "123"]
    assert 3 <= len(rows(run)) < 12 and checkpoint.newest(run).name == f"step-{len(rows(run)):08d}"
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert again.returncode == 0, again.stderr
    assert losses(run) == losses(whole)
    assert (tmp_path / "asked").read_text(encoding="utf8").split() == ["requeue", "123"]
