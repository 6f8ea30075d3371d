"""Progress of long loops: a bar on a terminal, a log line now and then elsewhere."""

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm  # type: ignore[import-untyped]

T = TypeVar("T")

_SECONDS_BETWEEN_LINES = 15.0

logger = logging.getLogger(__name__)


def track(items: Sequence[T], description: str) -> Iterator[T]:
    """Iterate over `items` and show how far it got."""
    if sys.stderr.isatty():
        yield from tqdm(items, desc=description)
        return
    started = reported = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - reported > _SECONDS_BETWEEN_LINES:
            left = (now - started) / done * (len(items) - done)
            logger.info("%s: %d of %d, about %.0f s left", description, done, len(items), left)
            reported = now
        yield item
