"""The picture of a prediction: what is written in it, and which joints are drawn."""

import numpy as np
import pytest
from PIL import Image

from timm_branches import Taxonomy
from timm_branches.inference.picture import plot_prediction, prediction_figure
from timm_branches.inference.predict import Record
from timm_branches.taxonomy import cifar10, cifar100

IMAGE = np.zeros((8, 8, 1), np.uint8)


def record(tree, labels, others=(), top=5, **kwargs):
    """A record whose candidates are the classes from 0 on, each less probable, and the chosen
    one."""
    candidates = []
    for depth, classes in enumerate(tree.num_classes):
        shown = {k: 0.5 / 2**k for k in range(min(top, classes))}
        if depth < len(labels):
            shown.setdefault(labels[depth], 0.004)
        candidates.append(tuple(shown.items()))
    return Record(
        "photos/a.jpg",
        labels,
        tuple(0.9 - 0.1 * i for i in range(len(labels))),
        tuple(tree.classes[d][k] for d, k in enumerate(labels)),
        candidates=tuple(candidates),
        **kwargs,
    )


def texts(figure):
    return [
        text.get_text()
        for axes in figure.axes
        for text in [*axes.texts, axes.title]
        if text.get_text()
    ]


def joints(figure):
    from matplotlib.patches import PathPatch

    return [patch for patch in figure.axes[1].patches if isinstance(patch, PathPatch)]


@pytest.mark.parametrize("tree", [cifar10(), cifar100()])
def test_names_and_numbers(tree):
    leaf = tree.num_leaves - 1
    labels = tuple(tree.expand(leaf).tolist())
    figure = prediction_figure(record(tree, labels), IMAGE, tree.levels, tree)
    written = texts(figure)
    for depth, level in enumerate(tree.levels):
        names = [name for name in tree.classes[depth] if name in written]
        assert level in written
        assert tree.classes[depth][labels[depth]] in names
        assert len(names) == min(5, tree.num_classes[depth])
    path = [tree.classes[d][k] for d, k in enumerate(labels)]
    assert f"{path[0]} 0.90 > {path[1]} 0.80 > {path[2]} 0.70" in written
    assert "a.jpg" in written
    assert written.count("50 %") == tree.num_levels  # the most probable one of each level
    assert "<1 %" in written
    assert (f"{tree.num_leaves - 5} more" in written) == (tree.num_leaves > 5)


def test_joints_are_the_trees():
    tree = Taxonomy(["a/b", "a/c", "d/e", "f"])
    good = prediction_figure(record(tree, (0, 1)), IMAGE, tree.levels, tree)
    styles = [patch.get_linestyle() for patch in joints(good)]
    assert len(styles) == 3  # b and c to a, e to d
    assert set(styles) <= {"-", "solid"}
    broken = joints(prediction_figure(record(tree, (1, 0)), IMAGE, tree.levels, tree))
    assert len(broken) == 3
    assert sum(patch.get_linestyle() not in ("-", "solid") for patch in broken) == 1


def test_where_the_path_ends():
    tree = Taxonomy(["a/b", "a/c", "d/e", "f"])
    stopped = texts(prediction_figure(record(tree, (0,), stopped=True), IMAGE, tree.levels, tree))
    assert "a 0.90 > (stopped)" in stopped
    assert any("not sure enough" in text for text in stopped)
    shallow = texts(prediction_figure(record(tree, (2,)), IMAGE, tree.levels, tree))
    assert "f 0.90" in shallow
    assert not any("not sure" in text for text in shallow)


def test_without_a_tree():
    tree = Taxonomy(["a/b", "a/c", "d/e"])
    labels = record(tree, (1, 0))
    plain = Record(labels.file, labels.labels, labels.probabilities, candidates=labels.candidates)
    figure = prediction_figure(plain, IMAGE, ["one", "two"])
    assert {"one", "two", "class 0", "class 1", "class 2"} <= set(texts(figure))
    assert joints(figure) == []


def test_file_with_any_names(tmp_path):
    tree = Taxonomy([("$x$", "$"), ("$x$", "a_{b}^c" * 9)], levels=["\\frac", "100%"])
    path = plot_prediction(
        record(tree, (0, 0)),
        np.zeros((9, 300, 3), np.uint8),
        tree.levels,
        tree,
        tmp_path / "new" / "a.png",
    )
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("known", "message"),
    [
        (Record("a.jpg", (0,), (1.0,)), "top=5"),
        (Record("a.jpg", error="a.jpg is broken"), "broken"),
    ],
)
def test_nothing_to_draw(known, message):
    with pytest.raises(ValueError, match=message):
        prediction_figure(known, IMAGE, ["level"])
