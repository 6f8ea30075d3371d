"""Parameters of the post_prune stage."""

from typing import Literal

from pydantic import Field

from gradiend_core.config.pre_prune import TopK
from gradiend_core.config.section import Section


class PostPrune(Section):
    """Which entries of the trained GRADIEND are kept."""

    topk: TopK | None = Field(
        None,
        description="entries kept: a count or a fraction, rounded up, of those left by pre_prune that reach the"
        " threshold; null keeps them all",
    )
    threshold: float | None = Field(
        None,
        ge=0,
        description="least importance of an entry that is kept, in units of the trained weights; null sets none",
    )
    part: Literal["encoder-weight", "decoder-weight", "decoder-bias", "decoder-sum"] = Field(
        "decoder-weight", description="weights whose absolute value is the importance"
    )
