"""What each part of the benchmark measures and costs. Needs Python only, to be read before anything is installed."""

import sys
from typing import NamedTuple


class Part(NamedTuple):
    """One part of `make bench`, with its cost on two otherwise idle cores."""

    what: str
    minutes: float
    disk_gb: float  # in temporary files, deleted at the end
    memory_gb: float


PARTS = {
    "collector": Part("gradient rows beside plain backward passes", 14, 0, 13),
    "reference": Part("gradient rows beside the reference package", 3, 0.5, 4),
    "store": Part("writing and reading a gradient store beside the disk and the memory", 1, 5, 6),
    "memory": Part("peak memory of a gradient pass beside its formula", 1, 0, 5),
    "step": Part("a training step beside torch's fused AdamW", 1, 0, 2),
    "stage": Part("the cache_gradients stage of the demo, if `make run` has been run", 0.5, 0.1, 1),
}
REFERENCE_INSTALL = "bench/.venv-reference with the reference package: 1.5 GB of disk, downloaded once"


def describe(names: list[str]) -> str:
    """What the named parts take, in lines for people."""
    chosen = {name: PARTS[name] for name in names}
    minutes = sum(part.minutes for part in chosen.values())
    disk, memory = (max(cost) for cost in zip(*((p.disk_gb, p.memory_gb) for p in chosen.values()), strict=True))
    lines = [f"  {name:<10} {part.what} (about {part.minutes:g} min)" for name, part in chosen.items()]
    if "reference" in chosen:
        lines.append(f"  needs {REFERENCE_INSTALL}")
    total = f"About {minutes:g} minutes on two cores, up to {disk:g} GB of temporary disk and {memory:g} GB of memory:"
    return "\n".join([total, *lines])


def chosen_parts(arguments: list[str]) -> list[str]:
    """The parts named on a command line, all of them if none is; exits with a message on an unknown name."""
    unknown = [name for name in arguments if name not in PARTS]
    if unknown:
        sys.exit(f"no part {unknown[0]!r}; the parts are {', '.join(PARTS)}")
    return arguments or list(PARTS)


if __name__ == "__main__":
    print(describe(chosen_parts(sys.argv[1:])))
