"""`python -m bench.scale [part] [stages …]`: simulate graphs of sleeping stages, write bench/results/scale.json."""

import json
import sys
import time

from bench.gradients.child import ROOT
from bench.gradients.report import machine
from bench.scale.engines import PARTS

RESULTS = ROOT / "bench" / "results" / "scale.json"
SIZES = {
    "snakemake": (100, 300, 1000, 3000, 10_000),
    "ilp": (100, 300, 1000),
    "cached": (100, 300, 1000, 3000, 10_000),
    "dvc": (100, 300, 1000, 10_000),
}


def main(arguments: list[str]) -> None:
    """Measure the named part at the named sizes, all by default; each result is kept as soon as it is there."""
    parts = arguments[:1] or list(PARTS)
    for part in parts:
        for stages in map(int, arguments[1:]) if arguments[1:] else SIZES[part]:
            start = time.perf_counter()
            found = {key: round(value, 4) for key, value in PARTS[part](stages).items()}
            print(f"{part} {found}, {time.perf_counter() - start:.0f} s", flush=True)
            known = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
            kept = [row for row in known.get(part, []) if row["jobs"] != found["jobs"]]
            known |= {"machine": machine(), part: sorted([*kept, found], key=lambda row: row["jobs"])}
            RESULTS.write_text(json.dumps(known, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
