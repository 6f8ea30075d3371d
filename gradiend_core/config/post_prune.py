"""Parameters of the post_prune stage."""

from typing import Literal

from pydantic import Field

from gradiend_core.config.pre_prune import TopK
from gradiend_core.config.section import Section


class PostPrune(Section):
    """Which entries of the trained GRADIEND are kept."""

    topk: TopK | None = Field(
        None, description="entries kept: a count or a fraction of those left by pre_prune, rounded up; null keeps all"
    )
    part: Literal["encoder-weight", "decoder-weight", "decoder-bias", "decoder-sum"] = Field(
        "decoder-weight", description="weights whose absolute value is the importance"
    )
