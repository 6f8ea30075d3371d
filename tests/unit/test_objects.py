"""Objects of the cache: damaged ones are removed, those that may not be read are not."""

import errno
import hashlib
import os
from pathlib import Path

import pytest

from pipeline import objects

CONTENT = b"gradients"
MD5 = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / MD5
    path.write_bytes(CONTENT)
    return path


def cannot_be_read(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path | str) -> str:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(objects, "md5_file", refused)


def test_an_object_is_what_its_name_says(stored: Path) -> None:
    assert objects.whole(stored, MD5)
    assert not objects.whole(stored.with_name("missing"), MD5)
    stored.write_bytes(b"other")
    assert not objects.whole(stored, MD5)
    assert not stored.exists()


def test_what_a_disk_has_lost_is_removed(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cannot_be_read(errno.EIO, monkeypatch)
    assert not objects.whole(stored, MD5)
    assert not stored.exists()


def test_what_another_user_keeps_from_us_stays(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cannot_be_read(errno.EACCES, monkeypatch)
    with pytest.raises(PermissionError):
        objects.whole(stored, MD5)
    assert stored.exists()
