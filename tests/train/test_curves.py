"""What the pictures show is read off the figure's own objects; the files are opened again."""

import os

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import same_color
from PIL import Image

from timm_branches.figures import MissingPackageError
from timm_branches.train.curves import (
    collapse_figure,
    confusion_figure,
    history_figure,
    plot_confusion,
    plot_history,
)
from timm_branches.train.log import CsvLog

WEIGHTS = [(0.98, 0.01, 0.01), (0.1, 0.8, 0.1), (0.1, 0.2, 0.7), (0.0, 0.0, 1.0)]


def rows():
    return [
        {
            "epoch": e,
            "train_loss": 1.0,
            "eval_coarse_top1": 80.0 + e,
            "eval_fine_top1": 40.0 + e,
            "lr": 0.1,
            "eval_medium_top1": 60.0 + e,
            "weight_coarse": w[0],
            "weight_medium": w[1],
            "weight_fine": w[2],
        }
        for e, w in enumerate(WEIGHTS)
    ]


def labels(axes):
    return [text.get_text() for text in axes.texts]


def test_history_shows_accuracy_and_weights_in_the_same_colours():
    top, bottom = history_figure(rows()).axes
    assert [line.get_label() for line in top.lines] == ["coarse", "medium", "fine"]
    assert top.lines[2].get_xdata().tolist() == [1, 2, 3, 4]  # people count from 1
    assert top.lines[2].get_ydata().tolist() == [40, 41, 42, 43]
    assert sorted(labels(top)) == ["coarse  83.0", "fine  43.0", "medium  63.0"]
    assert [band.get_label() for band in bottom.collections] == ["coarse", "medium", "fine"]
    for line, band in zip(top.lines, bottom.collections, strict=True):
        assert same_color(line.get_color(), band.get_facecolor()[0][:3])
    assert top.get_xlim() == bottom.get_xlim() == (0.5, 4.5)
    assert bottom.get_ylim() == pytest.approx((0, 1))


def test_weight_bands_are_stacked_and_change_between_epochs():
    bands = history_figure(rows()).axes[1].collections
    heights = [{tuple(np.round(v, 6)) for v in band.get_paths()[0].vertices} for band in bands]
    assert {(0.5, 0.98), (1.5, 0.98), (1.5, 0.1), (2.5, 0.1)} <= heights[0]
    assert {(1.5, 0.1), (1.5, 0.9), (2.5, 0.9), (2.5, 0.3)} <= heights[1]
    assert {(3.5, 1.0), (4.5, 1.0), (4.5, 0.0)} <= heights[2]


def test_missing_values_and_repeated_epochs(tmp_path):
    log = CsvLog(tmp_path / "a.csv")
    for row in rows():
        log.append(row)
    log.append(
        {"epoch": 2, "eval_fine_top1": 99.0, "eval_coarse_top1": float("nan"), "weight_fine": 0.7}
    )
    log.append({"note": "neither epoch nor numbers"})
    top, _ = history_figure(log.read()).axes
    assert top.lines[2].get_ydata().tolist() == [40, 41, 99, 43]
    assert top.lines[0].get_xdata().tolist() == [1, 2, 4]


def test_one_epoch_and_no_weights():
    (top,) = history_figure(rows()[:1]).axes  # weights that never change are no picture
    assert top.lines[0].get_marker() == "o"
    said = "loss weights of all epochs: coarse 0.98, medium 0.01, fine 0.01"
    assert top.get_title(loc="right") == said
    (only,) = history_figure([{"epoch": 3, "eval_flat_top1": 50.0}]).axes
    assert labels(only) == ["flat  50.0"]
    assert len(history_figure([{"epoch": 0, "weight_a": 0.5}]).axes[0].lines) == 0


def test_labels_of_equal_accuracies_do_not_cover_each_other():
    figure = history_figure(
        [{"epoch": e, **{f"eval_{k}_top1": 90.0 + e for k in "abcd"}} for e in range(2)]
    )
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 4
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])
        assert box.x1 <= figure.bbox.x1


def test_nothing_to_plot_says_why():
    with pytest.raises(ValueError, match=r"weight_<level>.*\['epoch', 'lr'\]"):
        history_figure([{"epoch": 0, "lr": 0.1}])
    with pytest.raises(ValueError, match="nothing to plot"):
        history_figure([])
    with pytest.raises(ValueError, match="no row has an epoch"):
        history_figure([{"epoch": None, "weight_a": 1.0}])


def test_confusion_is_normalised_by_row():
    matrix = torch.tensor([[3, 1, 0], [0, 5, 5], [0, 0, 0]])
    figure = confusion_figure(matrix, ["cat", "dog", "eel"], "fine")
    axes = figure.axes[0]
    image = np.ma.filled(axes.images[0].get_array(), np.nan)
    np.testing.assert_allclose(image, [[0.75, 0.25, 0], [0, 0.5, 0.5], [np.nan] * 3])
    assert [t for t in labels(axes) if t.isdigit()] == ["75", "25", "0", "0", "50", "50"]
    assert axes.get_title(loc="left") == "fine"
    assert [t.get_text() for t in axes.get_yticklabels()] == ["cat", "dog", "eel"]


@pytest.mark.parametrize("n", [1, 2, 12, 13, 100])
def test_confusion_of_any_number_of_classes_is_readable(n, tmp_path):
    names = [f"a class with a long name {i}" for i in range(n)]
    path = plot_confusion(np.eye(n), names, tmp_path / "plots" / "c.png", "fine")
    width, height = Image.open(path).size
    assert 300 <= width <= 2200
    assert 300 <= height <= 2200
    axes = confusion_figure(np.eye(n), names).axes[0]
    assert any(t.isdigit() for t in labels(axes)) == (n <= 12)
    assert len(axes.get_yticks()) == (n if n < 60 else n // 2)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.eye(3), r"2 class names need a matrix of shape \(2, 2\)"),
        (np.ones((2, 3)), r"got \(2, 3\)"),
        ([[1, -1], [0, 2]], "negative"),
    ],
)
def test_confusion_refuses_what_is_not_one(matrix, message):
    with pytest.raises(ValueError, match=message):
        confusion_figure(matrix, ["a", "b"])


def test_files_are_whole_and_the_users_matplotlib_is_untouched(tmp_path):
    before = matplotlib.rcParams["backend"], dict(matplotlib.rcParams)
    path = plot_history(rows(), tmp_path / "history.png")
    image = Image.open(path)
    image.load()
    assert image.format == "PNG"
    assert image.size == (1080, 750)
    assert len(np.unique(np.asarray(image.convert("L")))) > 20
    assert (matplotlib.rcParams["backend"], dict(matplotlib.rcParams)) == before
    assert os.listdir(tmp_path) == ["history.png"]


def test_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match="pip install"):
        history_figure(rows())


def test_collapse_shows_each_schedule_and_shades_what_is_off():
    off = [rows(), [dict(row, eval_coarse_top1=row["eval_coarse_top1"] - 10) for row in rows()]]
    figure = collapse_figure({"B-CNN": off, "kept": [rows()]}, ["coarse", "medium", "fine"])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["coarse", "medium", "fine"]
    coarse, _, fine = figure.axes
    assert {line.get_label() for line in coarse.lines} >= {"B-CNN", "kept"}
    mean = next(line for line in coarse.lines if line.get_label() == "B-CNN")
    assert mean.get_ydata() == pytest.approx([75, 76, 77, 78])
    shaded = [patch.get_x() for patch in coarse.patches]
    assert shaded == [3.5]  # the last epoch alone, which is the fourth
    assert not fine.patches


def test_history_of_a_metric_without_levels():
    found = [
        {"epoch": e, "eval_psnr": 25.0 + e, "eval_ssim": 0.5, "weight_image": 1.0} for e in range(3)
    ]
    (axes,) = history_figure(found, "psnr").axes
    assert axes.get_ylabel() == "psnr"
    assert axes.lines[0].get_ydata().tolist() == [25, 26, 27]
