"""A project whose jobs go to the cluster of a test, and what its stages say of themselves there."""

import json
import subprocess
import sys
from pathlib import Path

from project import Project
from slurm import Cluster, wait_until

# What a stub stage does besides its work: say where it runs, and what the test wants of it.
PROBE = """SALT = ""
import json, os, sys
from pathlib import Path
stage = sys.argv[1]
names = ("SLURM_JOB_ID", "SLURMD_NODENAME", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
seen = {"stage": stage} | {name: os.environ.get(name) for name in names}
seen["seed"] = sys.argv[sys.argv.index("--seed") + 1] if "--seed" in sys.argv else None
with open("placed.jsonl", "a") as placed:
    placed.write(json.dumps(seen) + "\\n")
if Path(f"act-{stage}.py").exists():
    exec(Path(f"act-{stage}.py").read_text())
"""
WAIT = """
import time
while not Path("go").exists():
    time.sleep(0.1)
"""
_POLLING = Path(__file__).with_name("polling.py")


class OnSlurm(Project):
    """A project whose jobs go to the cluster."""

    def __init__(self, folder: Path, slurm: Cluster) -> None:
        super().__init__(folder, folder.with_name(f"{folder.name}-site"))
        self.slurm = slurm
        sacct = folder / "profiles/slurm/without-accounting"
        self._environment |= slurm.environment | {"PATH": f"{sacct}:{slurm.environment['PATH']}"}
        self._started: list[subprocess.Popen[bytes]] = []

    def submit(self, *arguments: str, profile: str = "slurm") -> subprocess.Popen[bytes]:
        """Start Snakemake, which submits its jobs to the cluster."""
        command = [sys.executable, str(_POLLING), "--profile", f"profiles/{profile}", "--nocolor"]
        command += ["--latency-wait", "5", "--retries", "1", "--verbose", *arguments]
        with (self.folder / "snakemake.out").open("wb") as output:
            started = subprocess.Popen(command, cwd=self.folder, env=self._environment, stdout=output, stderr=output)
        self._started.append(started)
        return started

    def finish(self, snakemake: subprocess.Popen[bytes], *, succeeds: bool = True, seconds: float = 900) -> str:
        """Wait for Snakemake's end; what it said."""
        wait_until(lambda: snakemake.poll() is not None, seconds)
        assert (snakemake.returncode == 0) == succeeds, f"exit status {snakemake.returncode}"
        return self.said()

    def close(self) -> None:
        """Kill every Snakemake that still runs, and its jobs; print what was said, for pytest to show on failure."""
        for snakemake in self._started:
            snakemake.kill()
            snakemake.wait()
        print(self.said(), self.slurm.logs(last=3000), sep="\n")
        for job in self.jobs():
            self.slurm.run("scancel", job["JobId"])

    def said(self) -> str:
        """What Snakemake has said so far."""
        return (self.folder / "snakemake.out").read_text()

    def act(self, stage: str, code: str) -> None:
        """What the stage's programs do before their work."""
        (self.folder / f"act-{stage}.py").write_text(code)

    def wait_for(self, stage: str) -> dict[str, str | None]:
        """Wait until one of the stage's programs runs; where."""
        wait_until(lambda: self.placed(stage), 180)
        return self.placed(stage)[-1]

    def let_go(self) -> None:
        """Let the programs that wait go on."""
        (self.folder / "go").touch()

    def jobs(self) -> list[dict[str, str]]:
        """What Slurm knows of this project's jobs."""
        return [job for job in self.slurm.jobs() if job["WorkDir"] == str(self.folder)]

    def placed(self, stage: str) -> list[dict[str, str | None]]:
        """Where and with what the stage's programs have been started, the first one first."""
        file = self.folder / "placed.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [placed for placed in map(json.loads, lines) if placed["stage"] == stage]
