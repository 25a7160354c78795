"""The files of well-known collections, written here in small, with trees worked out by hand."""

import json

import pytest
from PIL import Image

from timm_branches import Taxonomy
from timm_branches.data import create_dataset
from timm_branches.taxonomy import get_taxonomy

RANKS = {
    "kingdom": "Animalia",
    "phylum": "Chordata",
    "class": "Aves",
    "order": "Passeriformes",
    "family": "Turdidae",
    "genus": "Turdus",
}


def write(folder, content, name="train.json"):
    for image in content.get("images", ()):
        Image.new("RGB", (2, 2)).save(folder / image["file_name"])
    (folder / name).write_text(json.dumps(content))
    return folder / name


def inaturalist():
    categories = [
        {"id": 1, "name": "Turdus migratorius", **RANKS},
        {"id": 0, "name": "Turdus merula", **RANKS},
        {
            "id": 2,
            "name": "Felis catus",
            **RANKS,
            "class": "Mammalia",
            "order": "Carnivora",
            "family": "Felidae",
            "genus": "Felis",
        },
    ]
    images = [{"id": 10 + i, "file_name": f"{i}.jpg"} for i in range(4)]
    annotations = [{"id": i, "image_id": 10 + i, "category_id": c} for i, c in enumerate([2, 0, 1])]
    return {"images": images, "annotations": annotations, "categories": categories}


def test_inaturalist(tmp_path):
    path = write(tmp_path, inaturalist())
    for tree in (get_taxonomy(path), create_dataset(path).taxonomy):
        assert tree.levels == (*RANKS, "species")
        assert tree.num_classes == (1, 1, 2, 2, 2, 2, 3)
        assert [leaf[-1] for leaf in tree.leaves] == [
            "Turdus merula",
            "Turdus migratorius",
            "Felis catus",
        ]
    data = create_dataset(path)
    assert data.labels[:, -1].tolist() == [2, 0, 1, -1]
    assert data.labels[0].tolist() == [0, 0, 1, 1, 1, 1, 2]


def test_coco(tmp_path):
    content = inaturalist()
    content["categories"] = [
        {"id": 0, "name": "cat", "supercategory": "animal"},
        {"id": 2, "name": "car", "supercategory": "vehicle"},
        {"id": 1, "name": "dog", "supercategory": "animal"},
    ]
    data = create_dataset(write(tmp_path, content))
    assert data.taxonomy.leaves == (("animal", "cat"), ("animal", "dog"), ("vehicle", "car"))
    assert data.labels.tolist() == [[1, 2], [0, 0], [0, 1], [-1, -1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"].append({"image_id": 10, "category_id": 0}), "several classes"),
        (lambda c: c["annotations"].append({"image_id": 99, "category_id": 0}), "image 99"),
        (lambda c: c["annotations"].append({"image_id": 10, "category_id": 9}), "category 9"),
        (lambda c: c["categories"][0].pop("genus"), "lacks genus"),
        (lambda c: c["categories"][0].update(id=0), "Two categories have the id 0"),
        (lambda c: c.pop("annotations"), "expected `images`, `annotations`"),
    ],
)
def test_refused(tmp_path, change, message):
    content = inaturalist()
    change(content)
    with pytest.raises(ValueError, match=message):
        create_dataset(write(tmp_path, content))


def test_missing_image(tmp_path):
    path = write(tmp_path, inaturalist())
    (tmp_path / "2.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file '2.jpg'"):
        create_dataset(path)


def test_open_images(tmp_path):
    hierarchy = {
        "LabelName": "/m/0bl9f",
        "Subcategory": [
            {
                "LabelName": "/m/0jbk",
                "Subcategory": [{"LabelName": "/m/01yrx"}, {"LabelName": "/m/0bt9lr"}],
                "Part": [{"LabelName": "/m/0283dt1"}],
            },
            {"LabelName": "/m/0k4j"},
        ],
    }
    path = write(tmp_path, hierarchy, "hierarchy.json")
    (tmp_path / "classes.csv").write_text(
        "/m/0jbk,Animal\n/m/01yrx,Cat\n/m/0bt9lr,Dog\n/m/0k4j,Car\n"
    )
    tree = Taxonomy.from_json(path, names=tmp_path / "classes.csv")
    assert tree.leaves == (("Animal", "Cat"), ("Animal", "Dog"), ("Car",))
    assert get_taxonomy(path).leaves[0] == ("/m/0jbk", "/m/01yrx")


def test_darwin_core(tmp_path):
    """Occurrences: tab-separated, with more columns than ranks, an image in each row."""
    rows = ["gbifID\toccurrenceDate\t" + "\t".join(RANKS) + "\tspecies\timage"]
    for i in range(12):
        values = list(RANKS.values())
        species = "Turdus merula" if i % 2 else "Turdus migratorius"
        rows.append(f"{i}\t2020-01-0{1 + i % 9}\t" + "\t".join(values) + f"\t{species}\t{i}.jpg")
        Image.new("RGB", (2, 2)).save(tmp_path / f"{i}.jpg")
    path = tmp_path / "occurrence.txt"
    path.write_text("\n".join(rows) + "\n")
    data = create_dataset(path, levels=[*RANKS, "species"])
    assert data.taxonomy.num_classes == (1, 1, 1, 1, 1, 1, 2)
    assert [leaf[-1] for leaf in data.taxonomy.leaves] == ["Turdus merula", "Turdus migratorius"]
    found = create_dataset(path)
    assert found.taxonomy.levels == data.taxonomy.levels
    assert found.labels.tolist() == data.labels.tolist()
