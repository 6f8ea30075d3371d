"""The training benchmark's own arithmetic; its measurements are in docs/training.md."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from bench.training import tables
from bench.training.stores import STORED, scaled
from gradiend_core.gradients.selection import Selection
from gradiend_core.gradients.store import INDEX, GradientStore

ROWS = 24


def store() -> GradientStore:
    """Rows of two transitions in two splits, n = 5."""
    index = pd.DataFrame(
        {
            "type": ["training"] * ROWS,
            "split": ["train", "train", "test"] * (ROWS // 3),
            "transition": ["a->b"] * (ROWS // 2) + ["b->a"] * (ROWS // 2),
            "row": range(ROWS),
        }
    ).reindex(columns=list(INDEX))
    matrices: dict[str, torch.Tensor] = {
        name: torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(len(name))) for name in STORED
    }
    return GradientStore(index, Selection.everything({"w": torch.empty(5)}), {}, (matrices,))


def test_scaled() -> None:
    assert torch.equal(scaled(store(), 100.0).matrix("diff"), store().matrix("diff") * 100)


def record(**changes: Any) -> dict[str, Any]:
    settings = {"scaling": "reference", "learning_rate": 1e-5}
    return {"n": 10, "source_norm": 1.0, "settings": settings, "converged": True, "test_r2": 0.5} | changes


def test_table_counts_seeds_and_replaces_itself(tmp_path: Path) -> None:
    results = {"m: size": [record(), record(converged=False, test_r2=-0.25), record(settings={})]}
    page = tmp_path / "page.md"
    page.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n", encoding="utf-8")
    for _ in range(2):
        tables.write(page, results)
        text = page.read_text("utf-8")
        assert text.startswith("before\n")
        assert text.endswith("\nafter\n")
        assert "old" not in text
        assert text.count("| n = 10, mean gradient norm 1 | 1 of 1, R² 0.50 | 1 of 2, R² -0.25 to 0.50 |") == 1
    assert json.loads(tables.as_json(results)) == results
