"""The releases of packages that may change a result: `versions.yaml`, which stages of dvc.yaml name in their params.

`python -m pipeline.versions` records those that are installed, after which the stages that import them are due.
"""

from importlib.metadata import version
from pathlib import Path

import yaml

from gradiend_core.errors import GradiendError

FILE = Path(__file__).parents[1] / "versions.yaml"
PACKAGES = ("numpy", "tokenizers", "torch", "transformers")


def installed() -> dict[str, str]:
    """The installed release of each package; builds of one release, as for a GPU, are the same."""
    return {name: version(name).partition("+")[0] for name in PACKAGES}


def check() -> None:
    """Raise `GradiendError` when a result would be filed under releases that did not make it."""
    recorded = yaml.safe_load(FILE.read_text("utf-8"))
    found = installed()
    different = [
        f"{name} {found[name]}, not {recorded.get(name)}," for name in PACKAGES if recorded.get(name) != found[name]
    ]
    if different:
        raise GradiendError(
            f"{FILE.name}: {' '.join(different)} is installed. `python -m pip install -e .` installs what is recorded;"
            " `python -m pipeline.versions` records what is installed, and the stages that import it run again."
        )


def record() -> None:
    """Write what is installed, below the file's remark."""
    remark, _, _ = FILE.read_text("utf-8").partition("\n")
    FILE.write_text(f"{remark}\n{yaml.safe_dump(installed())}", "utf-8")


if __name__ == "__main__":
    record()
