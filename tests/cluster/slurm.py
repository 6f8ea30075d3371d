"""A Slurm cluster on this machine: two nodes, a simulated GPU each, no root, nothing outside one temporary folder.

Where Slurm is not installed, its Debian packages are downloaded with apt and unpacked into that folder.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NODES = ("n1", "n2")
_PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")

# Memory is only counted, so that the nodes can have more of it than this machine.
_SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
MinJobAge=600
KillWait=2
MessageTimeout=3
SlurmdTimeout=5
ReturnToService=2
GresTypes=gpu
{plugins}
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port={node_ports} CPUs=4 RealMemory=64000 Gres=gpu:1
PartitionName=main Nodes={nodes} Default=YES State=UP
"""


class Cluster:
    """A running cluster: the environment in which Slurm's commands find it, and its daemons to kill and start."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        programs = folder / "bin"
        unpacked = None if shutil.which("slurmctld") else _unpack(folder / "packages")
        self.environment = _environment(programs, unpacked) | {"SLURM_CONF": f"{folder}/slurm.conf"}
        self._configure(unpacked)
        # The executor plugin takes SLURM_* from what runs inside a job, whose srun must find this cluster all the same.
        srun = programs / "srun"
        programs.mkdir()
        real = shutil.which("srun", path=self.environment["PATH"])
        srun.write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {real} "$@"\n')
        srun.chmod(0o755)

    def start(self) -> None:
        """Start all daemons and wait until the nodes are idle."""
        key, sock = self._folder / "munge.key", self._folder / "munge.socket"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = [f"--{name}-file={self._folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._start("munged", "--foreground", "--force", f"--socket={sock}", *files)
        wait_until(sock.exists, 10)
        self.start_controller()
        for node in NODES:
            self.start_node(node)
        wait_until(lambda: self.run("sinfo", "--noheader", "--format=%D %T").split() == ["2", "idle"], 30)

    def run(self, *command: str) -> str:
        """The output of one of Slurm's commands."""
        done = subprocess.run(command, env=os.environ | self.environment, text=True, capture_output=True)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def jobs(self) -> list[dict[str, str]]:
        """What Slurm knows of every job, the first one first."""
        lines = self.run("scontrol", "--oneliner", "show", "job").splitlines()
        fields = (line.split() for line in lines if line.startswith("JobId="))
        found = [dict(field.split("=", 1) for field in line if "=" in field) for line in fields]
        return sorted(found, key=lambda job: int(job["JobId"]))

    def start_controller(self) -> None:
        self._start("slurmctld", "-D")

    def kill_controller(self) -> None:
        self._kill("slurmctld")

    def start_node(self, node: str) -> None:
        stepd = shutil.which("slurmstepd", path=self.environment["PATH"])
        self._start("slurmd", "-D", "-N", node, "-d", str(stepd), name=node)

    def kill_node(self, node: str) -> None:
        """Kill the node's daemon and all that runs on it, as if its power had failed."""
        self._kill(node)
        _kill_all(self._opened_by(f"slurmd-{node}.log"))  # first: what starts and watches jobs could report their end
        conf = f"SLURM_CONF={self._folder}/slurm.conf"
        _kill_all(lambda process: {conf, f"SLURMD_NODENAME={node}"} <= _variables(process))

    def stop(self) -> None:
        """Kill every daemon and every job."""
        for name in [*self._daemons]:
            self._kill(name)
        conf = f"SLURM_CONF={self._folder}/slurm.conf"
        _kill_all(self._opened_by(""))
        _kill_all(lambda process: conf in _variables(process))

    def logs(self) -> str:
        """What the daemons have said, the nodes last."""
        return "\n".join(log.read_text() for log in sorted(self._folder.glob("slurm*d*.log")))

    def _start(self, program: str, *arguments: str, name: str | None = None) -> None:
        # With their parent's death they die, however it dies.
        command = ["setpriv", "--pdeathsig", "KILL", program, *arguments]
        output = (self._folder / f"{name or program}.out.log").open("ab")
        process = subprocess.Popen(command, env=os.environ | self.environment, stdout=output, stderr=output)
        output.close()
        self._daemons[name or program] = process

    def _kill(self, name: str) -> None:
        process = self._daemons.pop(name)
        process.kill()
        process.wait()

    def _opened_by(self, name: str) -> Callable[[Path], bool]:
        """Whether a process has a file of the cluster's folder open whose name begins so."""
        return lambda process: any(path.startswith(f"{self._folder}/{name}") for path in _open_files(process))

    def _configure(self, unpacked: Path | None) -> None:
        folder, host = self._folder, socket.gethostname()
        (folder / "state").mkdir()
        ports = _free_ports(1 + len(NODES))
        plugins = "" if unpacked is None else f"PluginDir={_plugins(unpacked)}"
        text = _SLURM_CONF.format(
            folder=folder,
            host=host,
            user=_user(),
            plugins=plugins,
            nodes=",".join(NODES),
            controller_port=ports[0],
            node_ports=",".join(map(str, ports[1:])),
        )
        (folder / "slurm.conf").write_text(text)
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")


@contextmanager
def cluster() -> Iterator[Cluster]:
    """A running cluster; when the block is left, nothing of it remains. Raises `OSError` when there is no Slurm."""
    # Not pytest's folder: the name of a socket must be short.
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        started = Cluster(Path(folder))
        try:
            started.start()
            yield started
        finally:
            started.stop()


def wait_until(condition: Callable[[], object], seconds: float) -> None:
    """Return as soon as the condition holds; fail when it does not within so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.2)


def _unpack(folder: Path) -> Path:
    """The packages' files, below a folder. Raises `OSError` when apt does not give them."""
    for name in ("lists/partial", "cache/archives/partial", "root"):
        (folder / name).mkdir(parents=True)
    options = [f"Dir::State::lists={folder}/lists", f"Dir::Cache={folder}/cache", "Debug::NoLocking=1"]
    options.append(f"APT::Sandbox::User={_user()}")
    apt = ["apt-get", "--quiet", *(f"--option={option}" for option in options)]
    install = ["install", "--yes", "--no-install-recommends", "--download-only", *_PACKAGES]
    for command in ([*apt, "update"], [*apt, *install]):
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode != 0:
            raise OSError(f"{' '.join(command)}: {done.stdout[-500:]}")
    root = folder / "root"
    for package in folder.glob("cache/archives/*.deb"):
        subprocess.run(["dpkg", "-x", package, root], check=True)
    for program in root.glob("usr/sbin/*-wlm"):
        program.with_name(program.name.removesuffix("-wlm")).symlink_to(program.name)
    return root


def _plugins(unpacked: Path) -> Path:
    return next(unpacked.glob("usr/lib/*/slurm-wlm"))


def _environment(programs: Path, unpacked: Path | None) -> dict[str, str]:
    path = os.environ["PATH"]
    if unpacked is None:
        return {"PATH": f"{programs}:{path}"}
    libraries = _plugins(unpacked)
    return {
        "PATH": f"{programs}:{unpacked}/usr/sbin:{unpacked}/usr/bin:{path}",
        "LD_LIBRARY_PATH": f"{libraries}:{libraries.parent}",
    }


def _user() -> str:
    return subprocess.run(["id", "-un"], text=True, check=True, capture_output=True).stdout.strip()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _kill_all(chosen: Callable[[Path], bool]) -> None:
    """Kill all processes for whose folder in /proc this is so, until there are none; never this one."""
    end = time.monotonic() + 20
    while found := [int(folder.name) for folder in Path("/proc").glob("[0-9]*") if chosen(folder)]:
        assert os.getpid() not in found
        assert time.monotonic() < end, f"processes {found} do not end"
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def _variables(process: Path) -> set[str]:
    try:
        return set((process / "environ").read_bytes().decode(errors="replace").split("\0"))
    except OSError:
        return set()


def _open_files(process: Path) -> list[str]:
    try:
        return [os.readlink(descriptor) for descriptor in (process / "fd").iterdir()]
    except OSError:
        return []
