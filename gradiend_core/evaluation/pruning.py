"""What pruning a trained GRADIEND costs: its scores before and after, on validation rows."""

from typing import Any

import torch
from torch import Tensor

from gradiend_core.gradients.store import TRAINING, GradientStore
from gradiend_core.model.gradiend import GradiendModel
from gradiend_core.statistics import pearson


def pruning_scores(full: GradiendModel, pruned: GradiendModel, store: GradientStore) -> dict[str, Any]:
    """Entries, correlation of encodings and labels, and R² of the reconstruction, before and after.

    Encodings are those of the first latent. R² is 1 - Σ(y - ŷ)² / Σ(y - ȳ)² over the validation rows and the entries
    of the model, with ȳ the mean of an entry. After pruning these are other entries; `r2_after_all_entries` is over
    those of the full model, of which the pruned one leaves the dropped ones as they are (ŷ = 0), so that it compares
    with `r2_before`. An R² of targets that do not vary is left out.
    """
    positions = store.positions(split="validation", kind=TRAINING)
    labels = store.index["label"].to_numpy()[positions.numpy()] * (-1.0 if full.source == "alternative" else 1.0)
    source, target = (store.rows(quantity, positions, full.selection) for quantity in (full.source, full.target))
    unpruned = pruned.selection.n == full.selection.n
    kept = slice(None) if unpruned else full.selection.locate(pruned.selection)  # a slice copies nothing
    squares, variation = _squares(target), _squares(target - target.mean(0))
    kept_source, kept_target = source[:, kept], target[:, kept]
    kept_squares, kept_variation = _squares(kept_target), _squares(kept_target - kept_target.mean(0))
    with torch.no_grad():
        before, after = full.encode(source), pruned.encode(kept_source)
        error, kept_error = _squares(target - full.decode(before)), _squares(kept_target - pruned.decode(after))
    found: dict[str, Any] = {"entries_before": full.selection.n, "entries_after": pruned.selection.n}
    for name, encoded in (("correlation_before", before), ("correlation_after", after)):
        found[name] = pearson(encoded[:, 0].double().numpy(), labels)
    residuals = {
        "r2_before": (error, variation),
        "r2_after": (kept_error, kept_variation),
        "r2_after_all_entries": (kept_error + squares - kept_squares, variation),
    }
    return found | {name: 1 - residual / total for name, (residual, total) in residuals.items() if total > 0}


def _squares(rows: Tensor) -> float:
    return float(rows.double().square().sum())
