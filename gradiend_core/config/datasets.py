"""Parameters of the generate_data stage."""

from pydantic import Field, model_validator

from gradiend_core.config.section import Name, Section, Seed


class Dataset(Section):
    """Training rows and neutral rows of one feature, found in a corpus by word lists."""

    corpus: Name = Field(description="the corpus to search")
    classes: dict[Name, list[str]] = Field(
        min_length=2, description="class name to its words; found as whole words in any casing"
    )
    max_size_per_class: int | None = Field(
        None, ge=1, description="rows per factual class over all splits, drawn at random; null keeps all"
    )
    min_left_context_words: int = Field(
        10, ge=0, description="words required before the first match; sentences with an earlier match are left out"
    )
    neutral_max_size: int = Field(
        1000, ge=0, description="neutral rows of each type (neutral texts; templates with another word masked)"
    )
    additional_excluded_words: list[str] = Field(
        [], description="words that, besides all class words, disqualify a text from being neutral"
    )
    seed: Seed = Field(42, description="seed of row sampling, alternative words and neutral masks")

    @model_validator(mode="after")
    def _words_are_usable(self) -> "Dataset":
        owner: dict[str, str] = {}
        problems = []
        for name, words in self.classes.items():
            if not words:
                problems.append(f"class {name!r} has no words")
            for word in words:
                if not word or word != word.strip():
                    problems.append(f"class {name!r}: {word!r} is not a word; write it without spaces around it")
                elif owner.setdefault(word.casefold(), name) != name:
                    problems.append(f"the word {word!r} is in two classes, {owner[word.casefold()]!r} and {name!r}")
        if problems:
            raise ValueError("; ".join(problems))
        return self
