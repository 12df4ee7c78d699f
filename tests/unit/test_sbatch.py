"""The sbatch script, with programs in the place of SLURM's: who gets the signal, and when it requeues."""

import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT = 60.0
# Stands for srun: writes its arguments, waits for the signal if it is told to, and leaves a status.
SRUN = """#!/bin/bash
printf '%s\\n' "$@" >"$PLACE/arguments"
trap 'echo signalled >>"$PLACE/events"; got=1' USR1
touch "$PLACE/up"
if [ "$WAITS" = 1 ]; then for _ in $(seq 600); do [ -n "${got:-}" ] && break; sleep 0.1; done; sleep 0.3; fi
status="$OUTPUT/my run/t 1/status.json"
[ -n "$STATE" ] && printf '{"state": "%s", "step": 3, "reason": ""}' "$STATE" >"$status"
echo left >>"$PLACE/events"
exit 1
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && { echo node7; exit; }
echo "$@" >>"$PLACE/events"
"""


class Cluster:
    """A place with its own ``srun`` and ``scontrol`` and the folder of a run, its path with spaces."""

    def __init__(self, root: Path) -> None:
        self.root, self.output = root, root / "out put"
        (self.output / "my run" / "t 1").mkdir(parents=True)
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (root / name).write_text(text)
            (root / name).chmod(0o755 | stat.S_IEXEC)

    def start(self, state: str, waits: bool, **more: str) -> subprocess.Popen[str]:
        env = {**os.environ, "PATH": f"{self.root}:{os.environ['PATH']}", "PLACE": str(self.root)}
        env |= {
            "CFG": "configs/my run.yaml",
            "DATA": "/my data",
            "OUTPUT": str(self.output),
            "TAG": "t 1",
        }
        env |= {
            "STATE": state,
            "WAITS": str(int(waits)),
            "SLURM_JOB_ID": "42",
            "SLURM_JOB_NODELIST": "n[7-8]",
        }
        script = ["bash", str(ROOT / "scripts" / "pretrain.sbatch"), "--epochs", "3"]
        return subprocess.Popen(
            script, env={**env, **more}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def events(self) -> list[str]:
        path = self.root / "events"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_reaches_the_workers_and_the_job_is_requeued(
    cluster: Cluster, number: signal.Signals
) -> None:
    job = cluster.start("preempted", waits=True)
    end = time.monotonic() + LIMIT
    while not (cluster.root / "up").exists() and time.monotonic() < end:
        time.sleep(0.02)
    job.send_signal(number)
    text, _ = job.communicate(timeout=LIMIT)
    assert job.returncode == 0, text
    # in this order: the workers have left
    assert cluster.events() == ["signalled", "left", "requeue 42"]
    arguments = (cluster.root / "arguments").read_text().splitlines()
    assert arguments[-10:] == [
        *("--cfg", "configs/my run.yaml", "--data-path", "/my data"),
        *("--output", str(cluster.output), "--tag", "t 1", "--epochs", "3"),
    ]
    assert "--rdzv-endpoint=node7:29500" in arguments


@pytest.mark.parametrize(
    ("state", "restarts", "code"),
    [
        ("done", "0", 0),
        ("failed", "0", 1),
        ("running", "0", 1),
        ("", "0", 1),
        ("preempted", "100", 1),
    ],
)
def test_nothing_else_is_requeued(cluster: Cluster, state: str, restarts: str, code: int) -> None:
    job = cluster.start(state, waits=False, SLURM_RESTART_COUNT=restarts)
    text, _ = job.communicate(timeout=LIMIT)
    assert job.returncode == code, text
    assert cluster.events() == ["left"]


def test_what_is_missing_is_named(cluster: Cluster) -> None:
    job = cluster.start("done", waits=False, CFG="")
    text, _ = job.communicate(timeout=LIMIT)
    assert job.returncode != 0
    assert "CFG: name the yaml" in text
