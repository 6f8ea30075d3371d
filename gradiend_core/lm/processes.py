"""One function in several processes of this machine that train together, as `torchrun --standalone` starts them."""

import ctypes
import logging
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from gradiend_core.devices import use_deterministic_algorithms
from gradiend_core.errors import GradiendError, killed_by

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>: a signal for this process when its parent has ended


@dataclass(frozen=True)
class _Settings:
    """What a new process has to be told to compute and log like the one that started it."""

    parent: int
    threads: int
    deterministic: bool
    log_format: str
    log_levels: dict[str, int]

    @staticmethod
    def of_this_process() -> "_Settings":
        formats = [getattr(handler.formatter, "_fmt", None) or "" for handler in logging.getLogger().handlers]
        loggers = {name: logging.getLogger(name).level for name in ("gradiend_core", "pipeline")}
        return _Settings(
            os.getpid(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            next(iter(formats), ""),
            loggers,
        )

    def apply(self) -> None:
        _end_with(self.parent)
        torch.set_num_threads(self.threads)
        if self.deterministic:
            use_deterministic_algorithms()
        if os.environ["RANK"] == "0":  # the others would say the same
            logging.basicConfig(format=self.log_format or logging.BASIC_FORMAT, stream=sys.stderr)
            for name, level in self.log_levels.items():
                logging.getLogger(name).setLevel(level)


def run_processes(function: Callable[[T], None], argument: T, processes: int) -> None:
    """Call `function(argument)` in so many processes at once; a single one is this process.

    They find each other through the usual variables (RANK, WORLD_SIZE, …), end when this process ends, and all end when
    one of them fails. `function` and `argument` are sent to them, so they must be picklable.

    Raises:
        GradiendError, OSError: one that a process raised; GradiendError: a process was killed.
        RuntimeError: another failure of a process, with its traceback.
    """
    if processes == 1:
        function(argument)
        return
    # Slow to import, and of no use to a single process.
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
    )
    # The launcher would log every failure with its traceback, which the error below names.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.multiprocessing").setLevel(logging.CRITICAL)
    try:
        elastic_launch(config, _run)(_Settings.of_this_process(), function, argument)
    except ChildFailedError as error:
        raise _first_failure(error, processes) from None
    except SignalException as received:
        raise SystemExit(128 + received.sigval) from None


def _first_failure(error: "ChildFailedError", processes: int) -> Exception:
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0:
        return GradiendError(f"process {rank} of {processes} was {killed_by(-failure.exitcode)}")
    data: Any = failure.message  # a text, or what `record` has written about an exception
    message = data if isinstance(data, str) else data["message"]
    kind, _, explanation = message.partition(": ")
    if kind == GradiendError.__name__:
        return GradiendError(explanation)
    if refused := re.fullmatch(r"\[Errno (\d+)\] .*: '(.+)'", explanation):
        number = int(refused[1])
        return OSError(number, os.strerror(number), refused[2])
    details = "" if isinstance(data, str) else f"\n{data['extraInfo']['py_callstack']}"
    return RuntimeError(f"process {rank} of {processes} failed: {message}{details}")


def _end_with(parent: int) -> None:
    """End this process when its parent does, for it would go on waiting for the others.

    Torch has it interrupted then, which is not noticed in a wait outside Python.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the process that started this one has ended")


def _run(settings: _Settings, function: Callable[[Any], None], argument: Any) -> None:
    settings.apply()
    function(argument)
