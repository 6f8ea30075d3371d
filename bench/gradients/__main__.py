"""`python -m bench.gradients [part …]`: measure, print every ratio beside its limit, write bench/results/."""

import os
import sys
import time
from importlib import import_module

from bench.gradients.child import QUIET, ROOT
from bench.gradients.plan import PARTS, chosen_parts
from bench.gradients.report import machine, save, text

RESULTS = ROOT / "bench" / "results"


def main(arguments: list[str]) -> None:
    """Run the named parts one after another, all of them by default."""
    missed = 0
    for part in chosen_parts(arguments):
        what = PARTS[part].what
        print(f"\n{part}: {what}", flush=True)
        start, found_machine = time.perf_counter(), machine()
        lines = []
        for group in import_module(f"bench.gradients.{part}").run():
            print(text(group), flush=True)
            lines += group
        if lines:
            save(RESULTS, part, what[0].upper() + what[1:], found_machine, lines)
        print(f"took {time.perf_counter() - start:.0f} s", flush=True)
        missed += sum(line.verdict == "MISS" for line in lines)
    print(f"\n{missed} limits missed; tables in {RESULTS.relative_to(ROOT)}")


if __name__ == "__main__":
    os.environ.update(QUIET)
    os.chdir(ROOT)
    main(sys.argv[1:])
