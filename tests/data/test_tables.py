"""Tables of people's data: what is read, what is said, what is refused, against plain dicts."""

import logging
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from timm_branches import Taxonomy
from timm_branches.data import create_dataset, create_splits, summarize
from timm_branches.taxonomy.table_files import read_table

SPECIES = {"cat": "animal", "dog": "animal", "fern": "plant", "moss": "plant"}


def save(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (2, 2), value).save(path)


@pytest.fixture
def photos(tmp_path):
    """24 photos in one folder, and their species in turn."""
    rows = []
    for i in range(24):
        save(tmp_path / f"p/{i}.png", i)
        species = list(SPECIES)[i % 4]
        rows.append((f"p/{i}.png", SPECIES[species], species))
    return tmp_path, rows


def write(folder, header, rows, name="list.csv", delimiter=",", encoding="utf-8"):
    text = delimiter.join(header) + "\n"
    text += "".join(delimiter.join(map(str, row)) + "\n" for row in rows)
    (folder / name).write_bytes(text.encode(encoding))
    return folder / name


def named(data):
    """The labels of every sample as names, from the tree."""
    names = []
    for row in data.labels.tolist():
        names.append(
            [
                data.taxonomy.classes[level][label] if label >= 0 else ""
                for level, label in enumerate(row)
            ]
        )
    return names


class TestColumns:
    def test_detected_and_said(self, photos):
        folder, rows = photos
        table = [
            (i, path, f"photo-{i}", "me" if i % 3 else "you", i % 5, kind, species, "Train")
            for i, (path, kind, species) in enumerate(rows)
        ]
        header = ["", "path", "image_id", "photographer", "fold", "kind", "species", "Split"]
        data = create_dataset(write(folder, header, table))
        assert data.taxonomy.levels == ("kind", "species")
        assert named(data) == [[kind, species] for _, kind, species in rows]
        said = str(data.summary)
        for text in ("species as level 2", "Split as split", "photographer as no level"):
            assert text in said
        assert data.summary.left_out == {"columns without a name": 1}

    @pytest.mark.parametrize("cut", ["who", "weather"])
    def test_a_column_that_cuts_across(self, photos, cut):
        """No level by its values, whatever it is called and wherever it stands."""
        folder, rows = photos
        for place in (1, 2, 3):
            table, header = [], ["path", "kind", "species"]
            header.insert(place, cut)
            for i, row in enumerate(rows):
                cells = list(row)
                cells.insert(place, "abc"[i % 3])
                table.append(cells)
            data = create_dataset(write(folder, header, table))
            assert data.taxonomy.levels == ("kind", "species"), place
            assert any(cut in warning for warning in data.summary.warnings)

    def test_a_class_per_image(self, photos):
        folder, rows = photos
        table = [(*row, f"specimen {i}") for i, row in enumerate(rows)]
        data = create_dataset(write(folder, ["path", "kind", "species", "specimen"], table))
        assert data.taxonomy.levels == ("kind", "species")
        assert data.summary.columns["specimen"] == "no level (another value in each row)"

    def test_asked_for(self, photos):
        folder, rows = photos
        table = [
            (species, path, kind, "val" if i % 2 else "train", i // 6)
            for i, (path, kind, species) in enumerate(rows)
        ]
        path = write(folder, ["art", "wo", "reich", "teil", "tag"], table)
        options = {
            "levels": ["reich", "art"],
            "path_column": "wo",
            "split_column": "teil",
            "group_column": "tag",
        }
        train, val, test = create_splits(path, **options)
        assert (len(train), len(val), test) == (12, 12, None)
        assert train.taxonomy.levels == ("reich", "art")
        assert train.groups.tolist() == [i // 6 for i in range(0, 24, 2)]
        with pytest.raises(ValueError, match="no column 'reic'"):
            create_splits(path, **options | {"levels": ["reic", "art"]})

    def test_fine_to_coarse(self, photos):
        folder, rows = photos
        table = [(path, species, kind) for path, kind, species in rows]
        path = write(folder, ["path", "species", "kind"], table)
        with pytest.raises(ValueError, match=r"from fine to coarse.*--levels kind species"):
            create_dataset(path)
        assert create_dataset(path, levels=["kind", "species"]).taxonomy.levels == (
            "kind",
            "species",
        )

    def test_homonyms_are_said(self, photos):
        folder, rows = photos
        table = [
            (path, kind, "other" if i % 6 == 0 else species)
            for i, (path, kind, species) in enumerate(rows)
        ]
        data = create_dataset(write(folder, ["path", "kind", "species"], table))
        assert named(data)[0][0] == "animal"
        assert sum(path[-1] == "other" for path in data.taxonomy.leaves) == 2
        assert any("'other'" in warning for warning in data.summary.warnings)

    def test_columns_of_what_is_no_table(self):
        with pytest.raises(ValueError, match="levels name columns of a table and have no effect"):
            create_dataset("digits", levels=["a"])


class TestForms:
    @pytest.mark.parametrize(
        ("name", "delimiter", "encoding"),
        [
            ("list.csv", ",", "utf-8"),
            ("list.csv", ",", "utf-8-sig"),
            ("list.csv", ",", "utf-16"),
            ("list.csv", ",", "utf-16-le"),
            ("list.csv", ",", "cp1252"),
            ("list.csv", ";", "utf-8"),
            ("list.csv", "\t", "utf-8"),
            ("list.tsv", "\t", "utf-8"),
            ("occurrence.txt", "\t", "utf-8"),
            ("LIST.CSV", ",", "utf-8"),
        ],
    )
    def test_dialects(self, photos, name, delimiter, encoding):
        folder, rows = photos
        table = [
            (path, kind.replace("animal", "Säugetier"), species) for path, kind, species in rows
        ]
        data = create_dataset(
            write(folder, ["path", "kind", "species"], table, name, delimiter, encoding)
        )
        assert named(data) == [list(row[1:]) for row in table]
        assert any("Windows-1252" in text for text in data.summary.warnings) == (
            encoding == "cp1252"
        )

    def test_parquet_and_frame(self, photos):
        pandas = pytest.importorskip("pandas")
        folder, rows = photos
        frame = pandas.DataFrame(rows, columns=["path", "kind", "species"])
        expected = [list(row[1:]) for row in rows]
        assert named(create_dataset(frame, root=str(folder))) == expected
        columns = {name: frame[name].tolist() for name in frame}
        assert named(create_dataset(columns, root=str(folder))) == expected
        try:
            frame.to_parquet(folder / "list.parquet")
        except ImportError:
            return  # no Parquet engine here
        assert named(create_dataset(folder / "list.parquet")) == expected

    def test_class_labels_of_datasets(self):
        class ClassLabel:
            names = ("cat", "dog")

        class Data(dict):
            column_names = ("label",)
            features = {"label": ClassLabel()}

        assert read_table(Data(label=[1, 0, -1, None])).columns["label"] == ["dog", "cat"]

    def test_surplus_cells(self, photos):
        folder, rows = photos
        rows[4] = (rows[4][0], "animal", "cat, wild")
        with pytest.raises(ValueError, match=r"list.csv, line 6: 4 cells.*must be quoted"):
            create_dataset(write(folder, ["path", "kind", "species"], rows))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "t.csv is empty"),
            (" \n\n", "t.csv is empty"),
            ('"\n', "line 1: a quotation mark"),
            ('path,kind\n1.jpg,cat\n2.jpg,"cat\n3.jpg,dog\n', "line 3: a quotation mark"),
            ('path,kind\n1.jpg,cat\n"2.jpg,dog', "line 3: a quotation mark"),
        ],
    )
    def test_text_without_an_end(self, tmp_path, text, message):
        (tmp_path / "t.csv").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            read_table(tmp_path / "t.csv")

    def test_cells_of_several_lines(self, tmp_path):
        text = 'path,kind\r1.jpg,"a ""big""\ncat"\r2.jpg,line\u2028end\r3.jpg,\x0bdog'
        (tmp_path / "t.csv").write_bytes(text.encode())
        kinds = read_table(tmp_path / "t.csv").columns["kind"]
        assert kinds == ['a "big"\ncat', "line\u2028end", "dog"]

    def test_bytes_that_are_no_text(self, tmp_path):
        (tmp_path / "t.csv").write_bytes(b"\xff\xfea\x00b\x00\x00")
        with pytest.raises(ValueError, match=r"t\.csv is neither UTF-8 nor UTF-16"):
            read_table(tmp_path / "t.csv")

    def test_empty_rows(self, photos):
        folder, rows = photos
        table = [*rows[:3], ("", "", ""), *rows[3:], ("", "", "")]
        data = create_dataset(write(folder, ["path", "kind", "species"], table))
        assert len(data) == 24
        assert data.summary.left_out == {"empty rows": 2}

    def test_paths_of_windows(self, photos):
        folder, rows = photos
        table = [(path.replace("/", "\\"), kind, species) for path, kind, species in rows]
        data = create_dataset(write(folder, ["path", "kind", "species"], table))
        assert [int(data[i][0].max() * 255) for i in range(24)] == list(range(24))

    def test_missing_files(self, photos):
        folder, rows = photos
        os.remove(folder / rows[7][0])
        with pytest.raises(
            FileNotFoundError, match=r"list.csv, line 9: there is no file 'p/7.png'"
        ):
            create_dataset(write(folder, ["path", "kind", "species"], rows))

    def test_two_labels(self, photos):
        folder, rows = photos
        rows.append((rows[0][0], "plant", "moss"))
        data = create_dataset(write(folder, ["path", "kind", "species"], rows))
        assert any("two labels" in text and "p/0.png" in text for text in data.summary.warnings)


class TestNames:
    @pytest.mark.parametrize("levels", [True, False])
    def test_slash_in_a_name(self, photos, levels):
        folder, rows = photos
        bands = ["AC/DC", "Abba", "Queen", "T.Rex"]
        if levels:
            table = [(path, kind, bands[i % 4]) for i, (path, kind, _) in enumerate(rows)]
            data = create_dataset(write(folder, ["path", "kind", "band"], table))
            assert data.taxonomy.num_levels == 2
        else:
            table = [(path, bands[i % 4]) for i, (path, _, _) in enumerate(rows)]
            data = create_dataset(write(folder, ["path", "label"], table))
            assert data.taxonomy.num_levels == 1
        assert [names[-1] for names in named(data)] == [bands[i % 4] for i in range(24)]
        # also when the tree is given again, as after loading a model
        again = create_dataset(
            folder / "list.csv", taxonomy=Taxonomy.from_dict(data.taxonomy.to_dict())
        )
        assert again.labels.tolist() == data.labels.tolist()

    def test_paths_in_one_column(self, photos):
        folder, rows = photos
        table = [(path, f"{kind}/{species}") for path, kind, species in rows]
        data = create_dataset(write(folder, ["path", "label"], table))
        assert named(data) == [[kind, species] for _, kind, species in rows]
        assert "paths of classes" in data.summary.columns["label"]

    def test_order_is_the_same_in_every_process(self, photos):
        folder, rows = photos
        twins = ["Robin", "robin", "7", "07", "10²", "10", "caf\u00e9", "cafe\u0301", "a b", "a  b"]
        table = [(path, twins[i % len(twins)]) for i, (path, _, _) in enumerate(rows)]
        path = write(folder, ["path", "label"], table)
        code = (
            "import sys; from timm_branches.data import create_dataset; "
            "print(ascii(create_dataset(sys.argv[1]).taxonomy.leaves))"
        )
        found = set()
        for seed in range(4):
            done = subprocess.run(
                [sys.executable, "-c", code, path],
                env={**os.environ, "PYTHONHASHSEED": str(seed)},
                capture_output=True,
                text=True,
                check=True,
            )
            found.add(done.stdout)
        assert len(found) == 1
        assert all(ascii(name) in next(iter(found)) for name in twins)

    def test_twins_are_said(self, photos):
        folder, rows = photos
        table = [(path, "Robin" if i % 2 else "robin") for i, (path, _, _) in enumerate(rows)]
        data = create_dataset(write(folder, ["path", "species"], table))
        assert any("'Robin' and 'robin'" in text for text in data.summary.warnings)

    def test_parents_that_contradict_the_tree(self, tmp_path):
        """A homonym: an animal of a plant's name."""
        tree = Taxonomy(["Plantae/Agathis/montana", "Animalia/Felis/catus"])
        save(tmp_path / "Animalia/montana/1.png")
        save(tmp_path / "Animalia/catus/1.png")
        with pytest.raises(ValueError, match=r"other parents.*Plantae/Agathis/montana"):
            create_dataset(tmp_path, taxonomy=tree)
        os.rename(tmp_path / "Animalia/montana", tmp_path / "montana")
        data = create_dataset(tmp_path, taxonomy=tree)
        assert sorted(map(tuple, data.labels.tolist())) == [(0, 0, 0), (1, 1, 1)]

    def test_a_coarse_label_stays_where_it_is(self, photos):
        """'Agathis' is a genus of plants and, elsewhere, a genus of wasps."""
        folder, rows = photos
        tree = Taxonomy(
            [("plant", "Agathis", "alba"), ("animal", "Felis", "catus")], levels=["a", "b", "c"]
        )
        table = [(path, "animal", "Agathis", "") for path, _, _ in rows]
        with pytest.raises(ValueError, match="line 2: no class fits"):
            create_dataset(write(folder, ["path", "a", "b", "c"], table), taxonomy=tree)


class TestSummaries:
    def test_of_splits(self, photos):
        folder, rows = photos
        table = [(*row, "train" if i < 20 else "test") for i, row in enumerate(rows)]
        table = [row for row in table if not (row[2] == "moss" and row[3] == "train")]
        (folder / "p/23.png").write_bytes((folder / "p/0.png").read_bytes())
        table[0] = (table[0][0], "", "", "train")
        path = write(folder, ["path", "kind", "species", "split"], table)
        train = create_dataset(path, "train")
        summary = summarize(train=train, test=create_dataset(path, "test"))
        assert summary.splits == {
            "train": {"images": 15, "classes": 3},
            "test": {"images": 4, "classes": 4},
        }
        assert summary.unlabelled == 1
        assert summary.levels == {"kind": 2, "species": 4}
        text = " ".join(summary.warnings)
        assert "1 of 4 classes have no training image: 'plant / moss'" in text
        assert "1 classes occur in test only: 'plant / moss'" in text
        assert "same in two splits" in text
        assert "same under two labels" in text
        assert type(summary).from_dict(summary.to_dict()) == summary


class TestSplitting:
    def test_every_class_keeps_a_training_image(self, photos):
        folder, rows = photos
        table = [(path, f"c{max(0, i - 12)}") for i, (path, _, _) in enumerate(rows)]
        train, val, _ = create_splits(write(folder, ["path", "label"], table), val_fraction=0.4)
        assert len(train) + len(val) == 24
        assert set(train.labels.flatten().tolist()) == set(range(12))

    def test_groups_are_not_divided(self, photos):
        folder, rows = photos
        for column in ("group", "subject_id", "patient"):
            table = [(*row, f"g{i // 3}") for i, row in enumerate(rows)]
            path = write(folder, ["path", "kind", "species", column], table)
            train, val, _ = create_splits(path, val_fraction=0.25)
            assert train.taxonomy.levels == ("kind", "species")
            assert len(train) + len(val) == 24
            assert not set(train.groups) & set(val.groups)
            assert len(set(train.labels[:, 1].tolist())) == 4

    def test_a_single_group(self, photos):
        folder, rows = photos
        path = write(folder, ["path", "kind", "species", "group"], [(*row, "g") for row in rows])
        with pytest.raises(ValueError, match="1 groups are not divided"):
            create_splits(path)


def test_reading_is_linear(tmp_path, caplog):
    """4,000 classes with level columns took a minute and a half when each row looked at all."""
    caplog.set_level(logging.WARNING)
    names = []
    for i in range(4000):
        names.append((f"{i}.png", f"o{i // 400}", f"f{i // 40}", f"g{i // 8}", f"s{i}"))
    blank = Image.new("L", (1, 1))
    blank.save(tmp_path / "0.png")
    for i in range(1, 4000):
        os.link(tmp_path / "0.png", tmp_path / f"{i}.png")
    path = write(tmp_path, ["path", "order", "family", "genus", "species"], names * 2)
    began = time.perf_counter()
    data = create_dataset(path)
    assert time.perf_counter() - began < 20  # generous: it takes a second or two
    assert data.taxonomy.num_classes == (10, 100, 500, 4000)
    order = np.array([tree[-1] for tree in data.taxonomy.nodes[3]])
    assert [order[label] for label in data.labels[:4000, 3]] == [row[4] for row in names]


class TestBalance:
    def test_class_weights(self):
        """Against the formulas, on counts 90, 9, 1."""
        import torch

        from timm_branches.hierarchy import class_weights

        labels = torch.tensor([0] * 90 + [1] * 9 + [2] + [-1] * 5)[:, None]
        tree = Taxonomy(["a", "b", "c", "d"], levels=["level"])
        counts = np.array([90, 9, 1])
        expected = {
            "inverse": 1 / counts,
            "sqrt": counts**-0.5,
            "effective": (1 - 0.9999) / (1 - 0.9999**counts),
        }
        for scheme, weights in expected.items():
            weights = weights / (weights @ counts / 100)
            found = class_weights(labels, tree, scheme)["level"].tolist()
            assert found == pytest.approx([*weights, 0], rel=1e-5)
        with pytest.raises(ValueError, match="no scheme 'no'"):
            class_weights(labels, tree, "no")

    def test_balanced_sampling(self):
        import torch

        from timm_branches.data import HierarchicalDataset, create_loader

        labels = [[0, 0]] * 90 + [[0, 1]] * 5 + [[1, 2]] * 5
        data = HierarchicalDataset(np.zeros((100, 2, 2), np.uint8), labels)
        drawn = {}
        for level in (0, 1):
            loader = create_loader(
                data, 10, is_training=True, sampler="balanced", balanced_level=level
            )
            rows = []
            for epoch in range(30):
                loader.set_epoch(epoch)
                rows += [y for _, y in loader]
            drawn[level] = torch.cat(rows)[:, level].bincount() / 3000
        assert drawn[0].tolist() == pytest.approx([1 / 2] * 2, abs=0.05)
        assert drawn[1].tolist() == pytest.approx([1 / 3] * 3, abs=0.05)

        def epoch_of(rank, world, epoch):
            sampler = create_loader(
                data, 5, is_training=True, sampler="balanced", rank=rank, world_size=world
            ).sampler
            sampler.set_epoch(epoch)
            return list(sampler)

        assert epoch_of(0, 1, 3) == epoch_of(0, 1, 3) != epoch_of(0, 1, 4)
        halves = [epoch_of(rank, 2, 3) for rank in (0, 1)]
        assert [i for pair in zip(*halves, strict=True) for i in pair] == epoch_of(0, 1, 3)
        with pytest.raises(ValueError, match="for training"):
            create_loader(data, 5, sampler="balanced")
        with pytest.raises(ValueError, match="write 'balanced'"):
            create_loader(data, 5, is_training=True, sampler="fair")
