"""What the pictures of trees show is read off the figure's own objects.

The files are opened again.
"""

import math

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import same_color
from PIL import Image

from tests.taxonomy.forests import UNEVEN, random_paths
from timm_branches.hierarchy.dendrogram import dendrogram_figure, plot_dendrogram
from timm_branches.hierarchy.plots import (
    plot_taxonomy,
    taxonomy_figure,
)
from timm_branches.taxonomy import Taxonomy, cifar10, cifar100, linkage_from_embeddings


def read(figure):
    """The texts with their places, the nodes' places, and the plain and the marked edges as
    pairs of nodes."""
    axes = figure.axes[0]
    texts = {
        (round(t.get_position()[0] - 6, 3), round(t.get_position()[1], 3)): t.get_text()
        for t in axes.texts
    }
    [dots] = [c for c in axes.collections if isinstance(c, PathCollection)]
    nodes = [tuple(np.round(spot, 3).tolist()) for spot in dots.get_offsets()]
    plain, marked = (c for c in axes.collections if isinstance(c, LineCollection))
    return texts, nodes, dots, plain, marked


def boxes(figure, texts):
    renderer = FigureCanvasAgg(figure).get_renderer()
    return [text.get_window_extent(renderer) for text in texts]


def overlaps(extents):
    return sum(a.overlaps(b) for i, a in enumerate(extents) for b in extents[:i])


class TestTaxonomy:
    @pytest.mark.parametrize("seed", range(8))
    def test_nodes_and_edges(self, seed):
        tree = Taxonomy(random_paths(seed))
        texts, nodes, _, plain, marked = read(taxonomy_figure(tree))
        everyone = [node for level in tree.nodes for node in level]
        assert [texts[spot] for spot in nodes] == [node[-1] for node in everyone]
        assert not len(marked.get_segments())
        place = dict(zip(everyone, nodes, strict=True))
        expected = sorted((place[node[:-1]][1], place[node]) for node in everyone if len(node) > 1)
        drawn = sorted((s[0][1], (s[-1][0] + 3, s[-1][1])) for s in plain.get_segments())
        assert np.allclose(
            [(y, *spot) for y, spot in drawn], [(y, *spot) for y, spot in expected], atol=1e-2
        )
        rows = sorted(place[leaf][1] for leaf in tree.leaves)
        assert np.allclose(np.diff(rows), 13)  # a line for each leaf
        assert len({x for x, _ in nodes}) == tree.num_levels

    @pytest.mark.parametrize("tree", [cifar10(), cifar100(), Taxonomy(UNEVEN), Taxonomy(["a"])])
    def test_nothing_overlaps_or_is_cut(self, tree):
        values = [torch.full((n,), 0.123) for n in tree.num_classes]
        figure = taxonomy_figure(
            tree, values, tree.expand(0), title="a title", value_name="accuracy"
        )
        extents = boxes(figure, figure.axes[0].texts) + boxes(
            figure, figure.axes[1].get_yticklabels()
        )
        assert not overlaps(extents)
        width, height = figure.get_size_inches() * figure.dpi
        assert all(
            0 <= box.x0 <= box.x1 <= width and 0 <= box.y0 <= box.y1 <= height for box in extents
        )

    def test_a_long_title_fits(self):
        figure = taxonomy_figure(
            Taxonomy(["a"]), title="a title that is longer than the tree is wide by far"
        )
        assert boxes(figure, figure.axes[0].texts)[0].x1 <= figure.get_size_inches()[0] * figure.dpi

    @pytest.mark.parametrize(
        ("row", "nodes", "edges"),
        [
            ([1, 5, 5], ["animal", "pet", "dog"], 2),
            ([1, 5, -1], ["animal", "pet"], 1),
            ([0, 5, 3], ["transport", "pet", "cat"], 1),  # contradicts itself on the first step
            ([-1, -1, -1], [], 0),
        ],
    )
    def test_highlight(self, row, nodes, edges):
        figure = taxonomy_figure(cifar10(), highlight=torch.tensor(row))
        assert [t.get_text() for t in figure.axes[0].texts if t.get_weight() == "bold"] == nodes
        assert len(read(figure)[4].get_segments()) == edges

    def test_values(self):
        values = [torch.tensor([0.25, 1.0]), torch.linspace(0, 0.6, 7), torch.full((10,), math.nan)]
        figure = taxonomy_figure(cifar10(), values, value_name="accuracy")
        texts, nodes, dots, _, _ = read(figure)
        shown = [texts[spot] for spot in nodes]
        assert shown[:3] == ["transport  0.25", "animal  1.00", "sky  0.00"]
        assert shown[-1] == "truck"  # nan is not written
        figure.canvas.draw()
        colours = dots.get_facecolors()
        assert same_color(colours[1], dots.get_cmap()(1.0))
        assert same_color(colours[-1], "#DDDDDD")
        assert dots.get_clim() == (0, 1)
        assert figure.axes[1].get_ylabel() == "accuracy"

    def test_values_beyond_shares(self):
        values = [torch.tensor([-2.0, 3.0]), torch.zeros(7), torch.ones(10)]
        assert read(taxonomy_figure(cifar10(), values))[2].get_clim() == (-2, 3)
        assert read(taxonomy_figure(Taxonomy(["a"]), [torch.tensor([5.0])]))[2].get_clim() == (5, 6)

    def test_file(self, tmp_path):
        path = plot_taxonomy(cifar10(), tmp_path / "new" / "tree.png", title="CIFAR-10")
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert len(np.unique(np.asarray(image.convert("L")))) > 10

    def test_names_are_no_formulas(self):
        assert "a$\\b$c" in [
            t.get_text() for t in taxonomy_figure(Taxonomy(["a$\\b$c"])).axes[0].texts
        ]
        taxonomy_figure(Taxonomy(["a$\\b$c"])).canvas.draw()  # as a formula it would be an error

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                {"values": [torch.zeros(2), torch.zeros(7)]},
                r"shapes \[\(2,\), \(7,\), \(10,\)\]; got \[\(2,\), \(7,\)\]",
            ),
            ({"values": [torch.zeros(2), torch.zeros(7), torch.zeros(1, 10)]}, "got"),
            ({"highlight": torch.tensor([0, 1])}, r"shape \(3,\), got \(2,\)"),
            ({"highlight": torch.tensor([0, 1, 10])}, "label of level 'fine' 10 is out of range"),
            ({"highlight": torch.tensor([0.0, 1.0, 2.0])}, "must be an integer"),
            ({"value_name": "accuracy"}, "there are none"),
        ],
    )
    def test_errors(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            taxonomy_figure(cifar10(), **arguments)

    def test_too_large(self):
        with pytest.raises(ValueError, match="2001 leaves are too many.*prune"):
            taxonomy_figure(Taxonomy([str(i) for i in range(2001)]))


class TestDendrogram:
    # a and c merge at 1, b and d at 2, all at 4, e joins at 8
    merges = [[0, 2, 1, 2], [1, 3, 2, 2], [5, 6, 4, 4], [4, 7, 8, 5]]
    names = ["a", "b", "c", "d", "e"]

    def test_tree(self):
        axes = dendrogram_figure(self.merges, self.names).axes[0]
        [tree] = axes.collections
        order = [t.get_text() for t in axes.get_yticklabels()]
        at = {name: order.index(name) for name in self.names}
        corners = [{tuple(point) for point in line.tolist()} for line in tree.get_segments()]
        assert corners[0] == {(0, at["a"]), (1, at["a"]), (1, at["c"]), (0, at["c"])}
        ac, bd = (at["a"] + at["c"]) / 2, (at["b"] + at["d"]) / 2
        assert corners[2] == {(1, ac), (4, ac), (4, bd), (2, bd)}
        assert corners[3] == {(0, at["e"]), (8, at["e"]), (8, (ac + bd) / 2), (4, (ac + bd) / 2)}
        assert abs(at["a"] - at["c"]) == abs(at["b"] - at["d"]) == 1  # lines do not cross

    def test_cuts(self):
        axes = dendrogram_figure(self.merges, self.names, (2, 3)).axes[0]
        assert [line.get_xdata()[0] for line in axes.lines] == [6, 3]
        assert [text.get_text() for text in axes.texts] == ["2 classes", "3 classes"]
        colours = {t.get_text(): t.get_color() for t in axes.get_yticklabels()}
        assert colours["a"] == colours["b"] == colours["c"] == colours["d"] != colours["e"]
        [tree] = axes.collections
        assert same_color(tree.get_colors()[0], colours["a"])
        assert not same_color(tree.get_colors()[3], colours["a"])  # joins two groups

    @pytest.mark.parametrize("count", [5, 100])
    def test_nothing_overlaps(self, count):
        vectors = torch.randn(count, 8, generator=torch.Generator().manual_seed(0))
        figure = dendrogram_figure(
            linkage_from_embeddings(vectors),
            [f"class number {i}" for i in range(count)],
            (2, 3, 4),
            title="a title",
        )
        figure.canvas.draw()
        axes = figure.axes[0]
        assert not overlaps(boxes(figure, [*axes.texts, *axes.get_yticklabels(), *figure.texts]))

    def test_a_single_class(self):
        axes = dendrogram_figure(np.empty((0, 4)), ["a"]).axes[0]
        assert [t.get_text() for t in axes.get_yticklabels()] == ["a"]

    def test_file(self, tmp_path):
        path = plot_dendrogram(self.merges, self.names, tmp_path / "new" / "tree.png", (2,))
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert len(np.unique(np.asarray(image.convert("L")))) > 10

    def test_errors(self):
        with pytest.raises(ValueError, match="5 classes needs 5 names, got 4"):
            dendrogram_figure(self.merges, self.names[:4])
        with pytest.raises(ValueError, match="increasing whole numbers"):
            dendrogram_figure(self.merges, self.names, (3, 2))
