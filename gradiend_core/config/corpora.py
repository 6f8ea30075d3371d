"""Parameters of the corpus stages."""

from typing import Annotated

from pydantic import Field, model_validator

from gradiend_core.config.section import DataPath, Section, Seed

Ratio = Annotated[float, Field(ge=0, le=1)]


class GrammarCorpus(Section):
    """A corpus written from a grammar and word lists."""

    path: DataPath = Field(description="folder with the grammar and its word lists")
    max_size: int = Field(ge=1, description="sentences to write")
    seed: Seed = Field(0, description="seed of the sampling")


class TextCorpus(Section):
    """A corpus read from your own text; each distinct text is assigned to one split."""

    path: DataPath = Field(description="file with one text per row: .txt (one per line), .csv or .parquet")
    text_column: str = Field("text", description="column that holds the text (.csv, .parquet)")
    split_column: str | None = Field(
        None, description="column with train/validation/test per row; null draws the splits at random"
    )
    split_ratios: list[Ratio] = Field(
        [0.8, 0.1, 0.1], min_length=3, max_length=3, description="share of texts for train, validation, test; sums to 1"
    )
    max_size: int | None = Field(None, ge=1, description="texts to keep, drawn at random; null keeps all")
    seed: Seed = Field(0, description="seed of the sampling and of the splits")

    @model_validator(mode="after")
    def _ratios_sum_to_one(self) -> "TextCorpus":
        if abs(sum(self.split_ratios) - 1) > 1e-6:
            raise ValueError(f"split_ratios must sum to 1; they sum to {sum(self.split_ratios):g}")
        return self
