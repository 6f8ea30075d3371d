"""Replaces `pipeline/__main__.py`: every stage sleeps for SLEEP seconds and writes its outputs, all of them small.

Imports as little as it can, so that a stage costs no more than the start of Python.
"""

import os
import sys
import time

from pipeline.outputs import FILES  # written beside this, from the stub stages of the tests


def main(stage, argv):
    time.sleep(float(os.environ.get("SLEEP", "0")))
    values = {argv[i].removeprefix("--"): argv[i + 1] for i in range(len(argv) - 1) if argv[i].startswith("--")}
    if stage == "check_params":
        paths = [values["output"]]
    else:
        names = dict.fromkeys(name.format(target=target, **values) for name in FILES[stage] for target in ("X", "Y"))
        paths = [*(os.path.join(values["output"], name).rstrip("/") for name in names), values["manifest"]]
    for path in paths:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{path}.aside", "w") as file:
            file.write(f"{stage} {argv} {path}\n")
        os.replace(f"{path}.aside", path)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
