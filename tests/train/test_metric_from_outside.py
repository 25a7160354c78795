"""A metric added from outside is logged, and chooses the best epoch by its own direction."""

import csv

import pytest
import torch

from tests.train.small_runs import loader_of, make_data, make_task, settings
from timm_branches.hierarchy import METRICS, register_metric
from timm_branches.train import fit


@pytest.mark.parametrize("higher_is_better", [False, True])
def test_it_chooses_the_best_epoch(tmp_path, higher_is_better):
    calls = []

    def lateness(batch):
        """Grows from evaluation to evaluation."""
        if len(batch.labels):
            calls.append(0)
        return torch.full((len(batch.labels),), float(len(calls)))

    register_metric("lateness", lateness, higher_is_better=higher_is_better)
    try:
        data = loader_of(make_data(8))
        config = settings(tmp_path, epochs=3, eval_metric="lateness")
        result = fit(make_task(), data, data, config)
    finally:
        del METRICS["lateness"]
    assert result.best_epoch == (2 if higher_is_better else 0)
    with open(tmp_path / "log.csv") as file:
        logged = [float(row["eval_lateness"]) for row in csv.DictReader(file)]
    assert len(logged) == 3
    assert logged == sorted(set(logged))
