"""Read the whole cache of DVC and all artifacts and compare their content with the hashes they were stored under.

For disks that rot and copies that broke off: neither engine reads a file again whose size, inode and modification time
are the known ones. Damaged objects are removed from the cache (or replaced, where the artifact is still whole), damaged
artifacts are marked, so that the next `snakemake` or `dvc repro` puts the right ones in their place.
"""

import argparse
import json
import logging
import os
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from dvc.dvcfile import LOCK_FILE, Lockfile
from dvc.repo import Repo
from dvc.utils.strictyaml import YAMLSyntaxError, YAMLValidationError

from gradiend_core.errors import GradiendError
from gradiend_core.files import sha256_file
from gradiend_core.progress import track
from pipeline import manifests
from pipeline.dag import private_repo, receipt_path
from pipeline.engine import take_turn
from pipeline.objects import drop_empty, md5_file, whole, whole_entry

Digests = dict[str, set[str]]


def main(argv: list[str]) -> int:
    """0 when nothing is damaged, 1 when something is or cannot be read."""
    argparse.ArgumentParser(prog="python -m pipeline.verify", description=__doc__).parse_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("gradiend_core").setLevel(logging.INFO)
    try:
        take_turn(print)  # what an engine is about to write is not damaged
        with private_repo() as repo:
            damaged = _set_aside_lock(repo) + _verify(repo)
    except (GradiendError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if damaged:
        print(f"{damaged} damaged. `snakemake` or `dvc repro` restores them, or makes them again.")
        return 1
    print("Nothing is damaged.")
    return 0


def _set_aside_lock(repo: Repo) -> int:
    """Rename a dvc.lock that DVC cannot read, as a kill while it was written leaves it; 1 if there was one."""
    try:
        Lockfile(repo, LOCK_FILE).load()
    except (YAMLSyntaxError, YAMLValidationError) as error:
        aside = Path(f"{LOCK_FILE}.damaged")
        Path(LOCK_FILE).replace(aside)
        reason = " ".join(str(error).split())
        print(f"{LOCK_FILE}: damaged: {reason}. Now {aside}; DVC finds all results in its run-cache again.")
        return 1
    return 0


def _verify(repo: Repo) -> int:
    """How many objects, entries of the run-cache and artifacts are damaged; each is named."""
    listed, known = _listed(), _known(repo)
    objects, entries = _objects(repo), _entries(repo)
    artifacts = [path for path in map(Path, sorted(listed.keys() | known.keys())) if path.is_file()]
    print(
        f"{len(objects)} objects ({_size(objects)}) and {len(entries)} run-cache entries of the cache,"
        f" {len(artifacts)} artifacts ({_size(artifacts)})",
        flush=True,
    )
    wrong = [path for path in track(objects, "objects") if not whole(path, _oid(path))]
    lost = [path for path in track(entries, "run-cache entries") if not whole_entry(path)]
    spoilt = [path for path in track(artifacts, "artifacts") if not _as_written(path, listed, known)]
    for folder in Path(repo.stage_cache.cache_dir).glob("??/*"):
        drop_empty(folder)  # also one that a killed `dvc repro` has made, and that no `dvc repro` gets past
    for path in wrong:
        _put_back(repo, _oid(path), known)
    return len(wrong) + len(lost) + len(spoilt)


def _objects(repo: Repo) -> list[Path]:
    name = re.compile(r"[0-9a-f]{30}(\.dir)?")
    return [path for path in sorted(Path(repo.cache.local.path).glob("??/*")) if name.fullmatch(path.name)]


def _entries(repo: Repo) -> list[Path]:
    name = re.compile(r"[0-9a-f]{64}")
    return [path for path in sorted(Path(repo.stage_cache.cache_dir).glob("??/*/*")) if name.fullmatch(path.name)]


def _oid(path: Path) -> str:
    return path.parent.name + path.name


def _listed() -> Digests:
    """SHA-256 of artifacts as the manifests give it, by their paths."""
    found: Digests = defaultdict(set)
    for manifest in manifests.FOLDER.glob("*/*.json"):
        with suppress(ValueError):  # damaged: it is compared with what the engines know of it
            for path, digest in manifests.outputs(manifest).items():
                found[path].add(digest)
    return found


def _known(repo: Repo) -> Digests:
    """MD5 of artifacts as Snakemake's receipts and dvc.lock give it, by their paths."""
    found: Digests = defaultdict(set)
    for stage in repo.index.stages:
        outputs = {output.def_path: output.hash_info.value for output in stage.outs}
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            outputs_of_snakemake = json.loads(receipt_path(stage.addressing).read_bytes())["outputs"]
            for path in outputs:
                found[path].add(outputs_of_snakemake[path])
        for path, digest in outputs.items():
            if digest:
                found[path].add(digest)
    return found


def _as_written(path: Path, listed: Digests, known: Digests) -> bool:
    """Whether an artifact is what its manifest says or, if none names it, what an engine has put there."""
    name = path.as_posix()
    if sha256_file(path) in listed[name] if name in listed else md5_file(path) in known[name]:
        return True
    os.utime(path)  # so that the engines, too, read it
    print(f"{path}: damaged or replaced: not what {'its manifest says' if name in listed else 'an engine wrote'}.")
    return False


def _put_back(repo: Repo, oid: str, known: Digests) -> None:
    """Make a removed object again from an artifact that is the same file, if there is one."""
    for name in sorted(name for name, digests in known.items() if oid in digests and Path(name).is_file()):
        if md5_file(name) == oid:
            repo.cache.local.add(os.path.abspath(name), repo.fs, oid)
            print(f"{repo.cache.local.oid_to_path(oid)}: put back from {name}.")
            return


def _size(paths: Sequence[Path]) -> str:
    return f"{sum(path.stat().st_size for path in paths) / 1e6:.1f} MB"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
