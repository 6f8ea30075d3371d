"""Run one stage by hand or from an engine: `python -m pipeline STAGE --help`."""

import ctypes
import importlib
import logging
import os
import signal
import sys
from difflib import get_close_matches
from types import FrameType
from typing import NoReturn

from gradiend_core.errors import GradiendError, out_of_memory

STAGES = (
    "check_params",
    "corpus_grammar",
    "corpus_text",
    "base_model_trained",
    "base_model_local",
    "base_model_hub",
    "generate_data",
    "pre_prune",
    "cache_gradients",
    "train",
    "select_seed",
    "post_prune",
    "evaluate_encoder",
    "evaluate_decoder",
    "rewrite_model",
    "plot",
)

_ENVIRONMENT = {
    # Sums are rounded differently when they are split over more threads: one, unless somebody says otherwise.
    "OMP_NUM_THREADS": "1",
    # Threads that spin while they wait slow every other job on the machine by an order of magnitude.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "TOKENIZERS_PARALLELISM": "false",
}
_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>: a signal for this process when its parent has ended


def main(argv: list[str]) -> int:
    """Run the stage named by `argv[0]`; 0 on success, 1 when the user can fix what was wrong, 2 on wrong usage."""
    if not argv or argv[0] in {"-h", "--help"}:
        print(f"usage: python -m pipeline STAGE ...\nstages: {', '.join(STAGES)}")
        return 0 if argv else 2
    name, arguments = argv[0], argv[1:]
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    signal.signal(signal.SIGTERM, _terminate)
    _end_with_dvc()
    logging.basicConfig(format=f"{name}: %(message)s", stream=sys.stderr)
    for ours in ("gradiend_core", "pipeline"):
        logging.getLogger(ours).setLevel(logging.INFO)
    memory = importlib.import_module("pipeline.memory")  # now: there may be none left to import it with
    try:
        if name not in STAGES:
            near = get_close_matches(name, STAGES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"stages: {', '.join(STAGES)}"
            raise GradiendError(f"{name}: no such stage; {hint}")
        if name != "check_params":
            # A guard, not an input: it can refuse a broken params.yaml but never changes a result. Imported by
            # name, so that a stage does not depend on the sections of all other stages.
            importlib.import_module("pipeline.check_params").check()
            importlib.import_module("pipeline.versions").check()
        importlib.import_module(f"pipeline.{name}").main(arguments)
    except GradiendError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if not out_of_memory(error):
            raise
        print(f"error: {memory.explained(name, error)}", file=sys.stderr)
        return 1
    return 0


def _end_with_dvc() -> None:
    # What a killed `dvc repro` has started must not write over the files of what is started after it. (Under Snakemake
    # the lock of pipeline/cached.py sees to that.)
    if "DVC_STAGE" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    # As an exception, so that files written aside are removed.
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
