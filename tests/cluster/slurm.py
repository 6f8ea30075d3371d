"""A Slurm cluster on this machine: two nodes, a simulated GPU each, no root, nothing outside one temporary folder.

Where Slurm is not installed, its Debian packages are downloaded with apt and unpacked into that folder.
"""

import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NODES = ("n1", "n2")
_PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmstepd", "sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
_PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "munge")
_SECONDS_FOR_DOWNLOADS = 90

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
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port={node_ports} CPUs=8 RealMemory=64000 Gres=gpu:1
PartitionName=main Nodes={nodes} Default=YES State=UP
PartitionName=cpu Nodes={nodes} State=UP
PartitionName=gpu Nodes={nodes} State=UP
"""


class NoSlurm(Exception):
    """Why no Slurm can be started on this machine."""


class Cluster:
    """A running cluster: the environment in which Slurm's commands find it, and its daemons to kill and start."""

    def __init__(self, folder: Path) -> None:
        self.environment: dict[str, str] = {}
        self._folder = folder
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start all daemons and wait until the nodes are idle; a failure says what they have said."""
        self._install()
        try:
            self._start_all()
        except AssertionError as error:
            error.add_note(self.logs(last=3000))
            raise

    def _install(self) -> None:
        programs = self._folder / "bin"
        unpacked = None if _installed() else _unpack(self._folder / "packages")
        self.environment = _environment(programs, unpacked) | {"SLURM_CONF": f"{self._folder}/slurm.conf"}
        self._configure(unpacked)
        # The executor plugin takes SLURM_* from what runs inside a job, whose srun must find this cluster all the same.
        srun = programs / "srun"
        programs.mkdir()
        real = shutil.which("srun", path=self.environment["PATH"])
        srun.write_text(f'#!/bin/sh\nSLURM_CONF={self._folder}/slurm.conf exec {real} "$@"\n')
        srun.chmod(0o755)

    def _start_all(self) -> None:
        key, sock = self._folder / "munge.key", self._folder / "munge.socket"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = [f"--{name}-file={self._folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._start("munged", "--foreground", "--force", f"--socket={sock}", *files)
        wait_until(sock.exists, 60)
        self.start_controller()
        for node in NODES:
            self.start_node(node)
        wait_until(lambda: self._ask("sinfo", "--noheader", "--format=%D %T").stdout.split() == ["2", "idle"], 60)

    def run(self, *command: str) -> str:
        """The output of one of Slurm's commands."""
        done = self._ask(*command)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def _ask(self, *command: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | self.environment
        return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=60)

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
        log = f"{self._folder}/slurmd-{node}.log"
        _kill_all(lambda process: _has_open(process, log))  # first: what starts and watches jobs could report their end
        conf = f"SLURM_CONF={self._folder}/slurm.conf"
        _kill_all(lambda process: {conf, f"SLURMD_NODENAME={node}"} <= _variables(process))

    def wait(self) -> None:
        """Wait until every daemon has ended."""
        for process in self._daemons.values():
            process.wait(timeout=20)

    def logs(self, last: int = 0) -> str:
        """What each daemon has said: all, or so many of its last characters."""
        logs = ((log.name, log.read_text(errors="replace")) for log in sorted(self._folder.glob("*.log")))
        return "\n".join(f"{name}:\n{text[-last:]}" for name, text in logs if text)

    def _start(self, program: str, *arguments: str, name: str | None = None) -> None:
        command, environment = [program, *arguments], os.environ | self.environment
        with (self._folder / f"{name or program}.out.log").open("ab") as output:
            self._daemons[name or program] = subprocess.Popen(command, env=environment, stdout=output, stderr=output)

    def _kill(self, name: str) -> None:
        process = self._daemons.pop(name)
        process.kill()
        process.wait()

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
    """A running cluster; when the block is left, nothing of it remains. Raises `NoSlurm` where there cannot be one."""
    _check()
    folder = tempfile.mkdtemp(prefix="slurm-")  # not pytest's folder: the name of a socket must be short
    started = Cluster(Path(folder))
    try:
        # It ends the cluster when its input ends: now, or when this process dies in the block, however it dies.
        with subprocess.Popen([sys.executable, __file__, folder], stdin=subprocess.PIPE, start_new_session=True):
            started.start()
            yield started
    finally:
        started.wait()


def _end(folder: str) -> None:
    """Kill every daemon and every job of the cluster in a folder, and delete it."""
    conf = f"SLURM_CONF={folder}/slurm.conf"
    try:
        _kill_all(lambda process: _has_open(process, f"{folder}/") or conf in _variables(process))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def wait_until(condition: Callable[[], object], seconds: float) -> None:
    """Return as soon as the condition holds; fail when it does not within so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.2)


def _check() -> None:
    if sys.platform != "linux":
        raise NoSlurm(f"its daemons run on Linux, not on {sys.platform}")
    if " " in tempfile.gettempdir():
        raise NoSlurm(f"its configuration takes no blanks, and the temporary folder is {tempfile.gettempdir()}")
    if not _installed() and not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise NoSlurm("it is not installed, and its Debian packages need apt-get and dpkg")


def _installed() -> bool:
    return all(shutil.which(program, path=_path()) for program in _PROGRAMS)


def _path() -> str:
    """Where programs are, those for administrators too, which an ordinary user's path may lack."""
    return os.pathsep.join([os.environ["PATH"], "/usr/local/sbin", "/usr/sbin"])


def _unpack(folder: Path) -> Path:
    """The packages' files, below a folder. Raises `NoSlurm` when apt does not give them."""
    for name in ("lists/partial", "cache/archives/partial", "root"):
        (folder / name).mkdir(parents=True)
    options = [f"Dir::State::lists={folder}/lists", f"Dir::Cache={folder}/cache", "Debug::NoLocking=1"]
    options += [f"APT::Sandbox::User={_user()}", "Acquire::Languages=none", "Acquire::Retries=1"]
    options += ["Acquire::http::Timeout=15", "Acquire::https::Timeout=15"]
    apt = ["apt-get", "--quiet", *(f"--option={option}" for option in options)]
    end = time.monotonic() + _SECONDS_FOR_DOWNLOADS
    _download([*apt, "update"], end)
    _download([*apt, "install", "--yes", "--no-install-recommends", "--reinstall", "--download-only", *_PACKAGES], end)
    root = folder / "root"
    for package in folder.glob("cache/archives/*.deb"):
        subprocess.run(["dpkg", "-x", package, root], check=True)
    for program in root.glob("usr/sbin/*-wlm"):
        program.with_name(program.name.removesuffix("-wlm")).symlink_to(program.name)
    return root


def _download(command: list[str], end: float) -> None:
    pipe, left = subprocess.PIPE, end - time.monotonic()
    try:
        done = subprocess.run(command, text=True, stdout=pipe, stderr=subprocess.STDOUT, timeout=left)
    except subprocess.TimeoutExpired:
        raise NoSlurm(f"its Debian packages were not downloaded within {_SECONDS_FOR_DOWNLOADS} s") from None
    if done.returncode != 0:
        raise NoSlurm(f"its Debian packages cannot be downloaded: {done.stdout.strip().splitlines()[-1]}")


def _plugins(unpacked: Path) -> Path:
    return next(unpacked.glob("usr/lib/*/slurm-wlm"))


def _environment(programs: Path, unpacked: Path | None) -> dict[str, str]:
    if unpacked is None:
        return {"PATH": f"{programs}:{_path()}"}
    libraries = _plugins(unpacked)
    return {
        "PATH": f"{programs}:{unpacked}/usr/sbin:{unpacked}/usr/bin:{_path()}",
        "LD_LIBRARY_PATH": f"{libraries}:{libraries.parent}",
    }


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        raise NoSlurm(f"the user {os.getuid()} has no name") from None


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, and that the system gives to no connection, also while a daemon is killed."""
    free: list[int] = []
    for port in random.sample(range(15000, 32000), 1000):
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            free.append(port)
        if len(free) == count:
            return free
    raise NoSlurm("no free ports")


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


def _has_open(process: Path, name: str) -> bool:
    """Whether a process has a file open whose name begins so."""
    try:
        return any(os.readlink(descriptor).startswith(name) for descriptor in (process / "fd").iterdir())
    except OSError:
        return False


if __name__ == "__main__":
    sys.stdin.read()
    _end(sys.argv[1])
