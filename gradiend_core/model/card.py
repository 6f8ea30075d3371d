"""The model card of a rewritten base model."""

from collections.abc import Mapping
from typing import Any

from gradiend_core.model.gradiend import GradiendModel

_CARD = """---
library_name: transformers
pipeline_tag: fill-mask
tags:
- gradiend
---

# {base_model}, rewritten towards {target}

This is `{base_model}` with {n} of its weights changed so that words of the class **{target}** become more likely.
It loads like any `transformers` model:

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

model = AutoModelForMaskedLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

## How it was made

A GRADIEND (gradient encoder-decoder, arXiv 2502.01406) was trained on gradients of the base model for the classes
`{first}` and `{second}` (source `{source}`, target `{target_quantity}`, seed {seed}). Its decoded update was added
to the weights: θ' = θ + {learning_rate:g} · decode({feature_factor:+g}). Dataset: `{dataset}`.

## Effect, on held-out rows

| | base model | this model |
|---|---|---|
| probability of {target} on rows of {other} | {base_value:.4f} | {value:.4f} ({value_low:.4f} to {value_high:.4f}) |
| language-modelling score on neutral texts | {base_lms:.4f} | {lms:.4f} ({lms_low:.4f} to {lms_high:.4f}) |

Intervals are bootstrap intervals over rows.{fallback}
"""

_FALLBACK = """

**No candidate kept the required share of the language-modelling score**: this is the one with the smallest rate.
"""


def model_card(gradiend: GradiendModel, target: str, selected: Mapping[str, Any]) -> str:
    """The text of README.md for the model rewritten towards `target` with the selected candidate."""
    first, second = gradiend.target_classes
    return _CARD.format_map(
        {
            **selected,
            "base_model": gradiend.metadata["base_model"],
            "dataset": gradiend.metadata["dataset"],
            "seed": gradiend.metadata["seed"],
            "n": gradiend.selection.n,
            "target": target,
            "other": second if target == first else first,
            "first": first,
            "second": second,
            "source": gradiend.source,
            "target_quantity": gradiend.target,
            "fallback": _FALLBACK if selected["fallback"] else "",
        }
    )
