"""The benchmark of pre-pruning runs, and its truth is held apart from its samples."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from bench import importance
from gradiend_core.data.tables import TRAINING
from gradiend_core.tables import write_table


def test_recalls_of_every_setting_are_written(
    reference_folder: Path,
    reference_rows: pd.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "tiny").mkdir()
    write_table(tmp_path / "tiny/training.parquet", reference_rows.assign(split="train"), TRAINING)
    monkeypatch.setattr(importance, "SIZES", (4, 8))
    places = ["--base-model", str(reference_folder), "--datasets", str(tmp_path), "--output", str(tmp_path / "r.json")]
    monkeypatch.setattr("sys.argv", ["importance", "tiny:M:F", "--seeds", "2", *places])
    importance.main()
    records = pd.DataFrame(json.loads((tmp_path / "r.json").read_text("utf-8"))["recall"])
    assert len(records) == 2 * 2 * (3 * 3 + 1)  # shares, truths, settings
    recalls = pd.DataFrame([[*row["low"], *row["mean"], *row["high"]] for _, row in records.iterrows()])
    assert recalls.shape[1] == 3 * 2  # numbers of rows
    assert ((recalls[0] <= recalls[2]) & (recalls[2] <= recalls[4])).all()
    assert all(0 <= value <= 1 for value in recalls.to_numpy(dtype=float).flat)
    largest = recalls[3][records["truth"] == "mean"].groupby([records["statistic"], records["source"]]).mean()
    assert largest["aligned_mean", "diff"] == pytest.approx(largest["the truth's own", "diff"])
    assert largest["aligned_mean", "diff"] > largest["mean", "diff"]
    assert capsys.readouterr().out.count("| 4 rows | 8 rows |") == 4


def test_effect_divides_by_the_spread_within_classes_and_leaves_out_what_never_changes() -> None:
    diff = torch.tensor([[1.0, 3.0, 0.0], [3.0, 3.5, 0.0], [-1.0, 1.0, 0.0], [-3.0, 1.5, 0.0]])
    positive = torch.tensor([True, True, False, False])
    feature = importance.Feature(pd.DataFrame(), positive, [], [], diff)
    found = importance.orders(feature, [0, 1, 2, 3])
    assert found["mean"].tolist() == [4.0, 2.0, 0.0]
    assert found["effect"].tolist() == pytest.approx([4 / 2**0.5, 2 / 0.125**0.5, 0.0])
