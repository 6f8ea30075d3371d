"""Progress of long loops: a bar on a terminal, a log line now and then elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm  # type: ignore[import-untyped]

T = TypeVar("T")

_SECONDS_BETWEEN_LINES = 15.0

logger = logging.getLogger(__name__)


def track(items: Sequence[T], description: str, status: Callable[[], str] | None = None) -> Iterator[T]:
    """Iterate over `items` and show how far it got, and what `status` says of the items done."""
    if sys.stderr.isatty():
        bar = tqdm(items, desc=description)
        for item in bar:
            yield item
            if status is not None:
                bar.set_postfix_str(status(), refresh=False)
        return
    started = reported = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - reported > _SECONDS_BETWEEN_LINES:
            left = (now - started) / done * (len(items) - done)
            said = f", {status()}" if status is not None else ""
            logger.info("%s: %d of %d, about %.0f s left%s", description, done, len(items), left, said)
            reported = now
        yield item
