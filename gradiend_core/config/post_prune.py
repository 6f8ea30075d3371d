"""Parameters of the post_prune stage."""

from typing import Literal

from pydantic import Field

from gradiend_core.config.pre_prune import TopK
from gradiend_core.config.section import Section


class Mask(Section):
    """A file that says which entries may stay."""

    path: str = Field(description="safetensors file with one bool tensor `mask` [n], n being the entries of the run")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of the file: results belong to its content")


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
    mask: Mask | None = Field(
        None,
        description="`{path: …, sha256: …}`: entries that may stay, chosen by you, before threshold and topk; see"
        " [pruning](pruning.md#a-mask-of-your-own); null lets all of them",
    )
    part: Literal["encoder-weight", "decoder-weight", "decoder-bias", "decoder-sum"] = Field(
        "decoder-weight", description="weights whose absolute value is the importance"
    )
