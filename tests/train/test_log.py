"""The CSV never loses a row; the trackers get numbers, or say what to install."""

import math
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from timm_branches.figures import MissingPackageError
from timm_branches.files import atomic_write
from timm_branches.train.log import CsvLog, Trackers, open_trackers


def test_rows_come_back_with_their_types(tmp_path):
    log = CsvLog(tmp_path / "run" / "summary.csv")
    log.append(
        {"epoch": 0, "loss": 0.1 + 0.2, "note": 'says "a, b"\nand more', "lr": 1e-9, "none": None}
    )
    log.append(
        {
            "epoch": 1,
            "loss": torch.tensor(1.5),
            "lr": np.float32(0.5),
            "note": "1_5",
            "none": math.inf,
        }
    )
    want = [
        {"epoch": 0, "loss": 0.1 + 0.2, "note": 'says "a, b"\nand more', "lr": 1e-9, "none": None},
        {"epoch": 1, "loss": 1.5, "note": "1_5", "lr": 0.5, "none": math.inf},
    ]
    assert log.read() == want
    assert CsvLog(log.path).read() == want
    assert isinstance(log.read()[0]["epoch"], int)
    log.append({"epoch": 2, "loss": float("nan")})
    assert math.isnan(CsvLog(log.path).read()[2]["loss"])


def test_header_is_the_first_row(tmp_path):
    CsvLog(tmp_path / "a.csv").append({"epoch": 0, "b": 1, "a": 2})
    assert (tmp_path / "a.csv").read_text() == "epoch,b,a\n0,1,2\n"


def test_late_columns_extend_the_header(tmp_path):
    log = CsvLog(tmp_path / "a.csv")
    log.append({"epoch": 0, "x": 1})
    log.append({"epoch": 1, "y": 2})
    assert CsvLog(log.path).read() == [
        {"epoch": 0, "x": 1, "y": None},
        {"epoch": 1, "x": None, "y": 2},
    ]


def test_resume_drops_the_epochs_that_are_repeated(tmp_path):
    log = CsvLog(tmp_path / "a.csv")
    for epoch in range(5):
        log.append({"epoch": epoch, "x": epoch})
    log.append({"note": "no epoch"})
    resumed = CsvLog(log.path, keep_until_epoch=3)
    assert [row["epoch"] for row in resumed.read()] == [0, 1, 2, None]
    resumed.append({"epoch": 3, "x": 30})
    assert [row["x"] for row in CsvLog(log.path).read()] == [0, 1, 2, None, 30]
    assert CsvLog(tmp_path / "new.csv", keep_until_epoch=3).read() == []


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    log = CsvLog(tmp_path / "a.csv")
    log.append({"epoch": 0})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        log.append({"epoch": 1})
    assert CsvLog(tmp_path / "a.csv").read() == [{"epoch": 0}]
    assert os.listdir(tmp_path) == ["a.csv"]


def test_foreign_files_and_empty_rows_are_refused(tmp_path):
    (tmp_path / "text.csv").write_text("hello\nworld, and more\n")
    with pytest.raises(ValueError, match=r"text.csv is not a log"):
        CsvLog(tmp_path / "text.csv")
    with pytest.raises(ValueError, match="empty"):
        CsvLog(tmp_path / "a.csv").append({})
    atomic_write(tmp_path / "empty.csv", b"")
    assert CsvLog(tmp_path / "empty.csv").read() == []


class Recorder:
    """Stands for a SummaryWriter and for a wandb run."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, *args, *kwargs.values()))


def test_trackers_get_the_finite_numbers():
    writer, run = Recorder(), Recorder()
    row = {"loss": torch.tensor(0.5), "epoch": 3, "note": "text", "gone": None, "bad": float("nan")}
    with Trackers(writer, run) as trackers:
        trackers.log(row, step=3)
    trackers.close()
    assert writer.calls == [
        ("add_scalar", "loss", 0.5, 3),
        ("add_scalar", "epoch", 3.0, 3),
        ("close",),
    ]
    assert run.calls == [("log", {"loss": 0.5, "epoch": 3.0}, 3), ("finish",)]


def test_nothing_asked_for_is_nothing_done(tmp_path):
    trackers = open_trackers(output=tmp_path)
    trackers.log({"loss": 1.0}, step=0)
    trackers.close()
    assert os.listdir(tmp_path) == []


def test_tensorboard_writes_event_files(tmp_path):
    pytest.importorskip("tensorboard")
    with open_trackers(
        tensorboard=True, output=tmp_path, config={"lr": 0.1, "taps": [3, 4]}
    ) as trackers:
        trackers.log({"eval_fine_top1": 40.0}, step=1)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("eval_fine_top1")] == [(1, 40.0)]


def test_wandb_is_opened_with_project_and_config(tmp_path, monkeypatch):
    opened = {}
    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(init=lambda **kw: opened.update(kw) or Recorder())
    )
    open_trackers(wandb="fashion", output=tmp_path, config={"lr": 0.1}).close()
    assert opened == {"project": "fashion", "dir": str(tmp_path), "config": {"lr": 0.1}}


@pytest.mark.parametrize(
    ("module", "kwargs"),
    [("torch.utils.tensorboard", {"tensorboard": True}), ("wandb", {"wandb": "project"})],
)
def test_a_missing_package_says_what_to_install(module, kwargs, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError, match=r"pip install 'timm_branches\[") as caught:
        open_trackers(output=tmp_path, **kwargs)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, ImportError)
