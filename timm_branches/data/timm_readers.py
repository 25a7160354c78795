"""What timm's names `hfds/...` and `wds/...` stand for, with a label on every level.

timm's reader of Hugging Face data sets opens them here as well; its readers of shards and streams
go through their samples front to back and give one number each, so that neither a tree nor a split
could be told before all of them were read. Shards of WebDataset are plain tars, which are read in
place instead.
"""

import glob
import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from timm_branches.arguments import as_items
from timm_branches.data.decode import ValueRange, decode_image, read_file
from timm_branches.data.images import PackedImages, TarImages, open_tar
from timm_branches.data.sources import Source, label_table
from timm_branches.data.splits import split_of
from timm_branches.data.summary import listed
from timm_branches.taxonomy.table_files import Table, read_table
from timm_branches.taxonomy.taxonomy import Taxonomy

__all__ = ["read_hfds", "read_wds", "refuse_hfids", "refuse_tfds"]


def _check_levels(columns: dict[str, Any]) -> None:
    """Let a single text be no list of letters."""
    if columns.get("levels") is not None:
        columns["levels"] = list(as_items("levels=", columns["levels"], "['shape', 'digit']"))


# ---- Hugging Face datasets


class RowImages:
    """The images in a column of a `datasets.Dataset`, decoded when they are asked for.

    Args:
        rows: The data set, with undecoded images.
        column: The column of images.
        names: What to call each in an error.
        in_chans: 3 for RGB, 1 for grey, more for as many bands.
    """

    def __init__(self, rows: Any, column: str, names: Sequence[str], in_chans: int = 3) -> None:
        self.rows = rows
        self.column = column
        self.names = np.array(list(names), dtype=str)
        self.in_chans = in_chans
        self.value_range: ValueRange | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> np.ndarray:
        name = str(self.names[index])
        return decode_image(self._bytes(index), self.in_chans, name, self.value_range)

    def _bytes(self, index: int) -> bytes:
        cell = self.rows[int(index)][self.column]
        if cell is None:
            raise ValueError(f"{self.names[index]} has no image.")
        return cell["bytes"] or read_file(cell["path"])

    def identity(self, indices: Iterable[int]) -> str:
        """A checksum of the undecoded bytes of these images."""
        digest = hashlib.sha256()
        for index in indices:
            digest.update(hashlib.sha256(self._bytes(index)).digest())
        return digest.hexdigest()


def read_hfds(
    name: str, split: str, in_chans: int, taxonomy: Taxonomy | None, **columns: Any
) -> Source:
    """A data set of Hugging Face's `datasets`, of the Hub or in a folder, opened by timm's reader.

    Its columns are those of a table, see :func:`timm_branches.data.sources.read_csv`: class indices
    (ClassLabel) are known by their names, None and negative ones are unknown.

    Args:
        name: What stands behind `hfds/`: a folder of Parquet files, or a name on the Hub.
        split: Not needed: all splits are read, so that class 3 of one is class 3 of another.
        in_chans: 3 for RGB, 1 for grey.
        taxonomy: The tree to find the names in; None derives it from the rows.
        **columns: `levels`, the columns that timm calls `target_key`, coarsest first;
            `path_column`, the column of images, timm's `input_key`; `split_column`,
            `group_column`.

    Returns:
        The images of all splits, one after the other.

    Raises:
        ImportError: `datasets` is not installed.
        FileNotFoundError: There is no such data set, or it cannot be reached.
        ValueError: A column is missing, or as of a table.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"hfds/{name} needs Hugging Face's datasets: pip install datasets."
        ) from error
    source = f"hfds/{name}"
    _check_levels(columns)
    if not name:
        raise FileNotFoundError(f"{source} names no data set; give a folder, or user/name.")
    try:
        found = datasets.get_dataset_split_names(name)
        features = datasets.load_dataset(name, split=found[0]).features
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise FileNotFoundError(
            f"{source} is neither a folder of Parquet files or images, nor a data set that the Hub "
            f"gives here: {error}"
        ) from error
    column = _image_column(features, columns.pop("path_column", None), source)
    parts, left_out = _open_splits(name, found, column)
    rows = datasets.concatenate_datasets(list(parts.values()))
    names = _row_names(rows, column, source)
    table = _as_table(rows, column, names, columns, source)
    labelled = label_table(table, taxonomy, path_column=column, **columns).source
    labelled.summary.left_out |= left_out
    labelled.images = RowImages(rows, column, names, in_chans)
    if labelled.splits is None:
        meanings = [split_of(part) or "train" for part in parts]
        labelled.splits = np.repeat(meanings, [len(part) for part in parts.values()])
    return labelled


def _image_column(features: Mapping[str, Any], asked: str | None, source: str) -> str:
    """The column of images: the one asked for, or the only one."""
    import datasets

    if asked is not None:
        if asked not in features:
            raise ValueError(f"{source} has no column {asked!r}; its columns are {list(features)}.")
        return asked
    found = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    if len(found) == 1:
        return found[0]
    if "image" in features:  # Parquet that does not say what its bytes are
        return "image"
    raise ValueError(
        f"{source} has {len(found)} columns of images among {list(features)}; name one: "
        "path_column= (--input-key)."
    )


def _open_splits(
    name: str, found: Sequence[str], column: str
) -> tuple[dict[str, Any], dict[str, int]]:
    """The rows of each split as timm's reader opens them, and how many are left out."""
    from timm.data.readers import create_reader

    parts = {}
    for part in found:
        parts[part] = create_reader(f"hfds/{name}", split=part, input_key=column).dataset
    others = [part for part in found if split_of(part) is None]
    left_out: dict[str, int] = {}
    if len(others) < len(found):
        for part in others:
            left_out[f"images of {part!r}, which is no split"] = len(parts.pop(part))
    return parts, left_out


def _row_names(rows: Any, column: str, source: str) -> list[str]:
    """What to call each image: its path, or its row."""
    from pyarrow import compute

    # the paths alone, since a row holds its image's bytes as well
    paths = compute.struct_field(rows.data.column(column), "path").to_pylist()
    return [path or f"row {row} of {source}" for row, path in enumerate(paths)]


def _as_table(
    rows: Any, column: str, names: list[str], columns: Mapping[str, Any], source: str
) -> Table:
    """The columns that may be labels, splits or groups, and the images' names for the images."""
    import datasets

    kept = []
    for name, kind in rows.features.items():
        if name != column and isinstance(kind, datasets.ClassLabel | datasets.Value):
            kept.append(name)
    levels = columns.get("levels")
    if levels is not None:
        asked = [*levels, columns.get("split_column"), columns.get("group_column")]
        asked = list(filter(None, asked))
        wrong = [name for name in asked if name not in kept]
        if wrong:
            raise ValueError(
                f"{source} has no column {wrong[0]!r} with a name or a number a row; such columns "
                f"are {kept}."
            )
        kept = list(dict.fromkeys(asked))
    if not kept:
        raise ValueError(
            f"{source} has no labels: of its columns {list(rows.features)} none holds a name or a "
            "number a row."
        )
    table = read_table(rows.select_columns(kept).add_column(column, names))
    table.source = source
    return table


def refuse_hfids(name: str, **options: Any) -> NoReturn:
    """Say what to do with a stream of the Hub's.

    Raises:
        ValueError: Always.
    """
    raise ValueError(
        f"hfids/{name} is a stream: its classes and splits are not known before all of it was "
        f"read. Give hfds/{name}: the same data, with random access."
    )


def refuse_tfds(name: str, **options: Any) -> NoReturn:
    """Say what to do with a data set of TensorFlow's.

    Raises:
        ValueError: Always.
    """
    raise ValueError(
        f"tfds/{name} is a stream of TensorFlow records, which have no random access. Write it as "
        "Parquet (datasets.Dataset.to_parquet) and give hfds/FOLDER, or as a folder of class "
        "folders."
    )


# ---- WebDataset


class JoinedImages:
    """The images of several archives, one after the other.

    Args:
        parts: Images with `names`, as `open_tar` gives them.
    """

    def __init__(self, parts: Sequence[PackedImages | TarImages]) -> None:
        self.parts = list(parts)
        self.ends = np.cumsum([len(part) for part in parts])
        self.names = np.concatenate([part.names for part in parts])

    def __len__(self) -> int:
        return len(self.names)

    def _find(self, index: int) -> tuple[int, int]:
        """Which part holds an image, and where."""
        index = range(len(self))[index]
        part = int(np.searchsorted(self.ends, index, side="right"))
        return part, index - int(self.ends[part]) + len(self.parts[part])

    def __getitem__(self, index: int) -> np.ndarray:
        part, place = self._find(index)
        return self.parts[part][place]

    def identity(self, indices: Iterable[int]) -> str:
        """A checksum of the archives' own, each of the images that are asked of it."""
        digest = hashlib.sha256()
        places: dict[int, list[int]] = {}
        for index in indices:
            part, place = self._find(index)
            places.setdefault(part, []).append(place)
            digest.update(f"{part} {place} ".encode())
        for part, asked in places.items():
            digest.update(self.parts[part].identity(asked).encode())
        return digest.hexdigest()

    @property
    def value_range(self) -> ValueRange | None:
        """The values of black and white, see :func:`timm_branches.data.decode.decode_image`."""
        return self.parts[0].value_range

    @value_range.setter
    def value_range(self, limits: ValueRange | None) -> None:
        for part in self.parts:
            part.value_range = limits


def read_wds(
    name: str, split: str, in_chans: int, taxonomy: Taxonomy | None, **columns: Any
) -> Source:
    """Shards of WebDataset: tars of images with their labels in `.json` or `.cls` beside them.

    A sample is what has the same name up to its first dot. Numbers below 0 and missing fields are
    unknown. Shards are read in place; compressed ones are kept in memory, undecoded.

    Args:
        name: What stands behind `wds/`: a folder of shards, with timm's `info.json` or with splits
            in the shards' names (`train-000.tar`); or shards, as `train-{000..009}.tar` or
            `train-*.tar`.
        split: Not needed: all splits are read, so that class 3 of one is class 3 of another.
        in_chans: 3 for RGB, 1 for grey.
        taxonomy: The tree to find the names in; None derives it from the samples.
        **columns: `levels`, the fields of the JSON that timm calls `target_key`, coarsest first; as
            in timm `.cls` is read without; `path_column`, the ending of the images, timm's
            `input_key`; `split_column` and `group_column`, more fields.

    Returns:
        The images of all shards, one after the other.

    Raises:
        FileNotFoundError: There are no such shards.
        ValueError: A shard is no complete tar or not on this machine, a sample has several images,
            or as of a table.
    """
    source = f"wds/{name}"
    _check_levels(columns)
    shards, left_out = _find_shards(name, source)
    endings = columns.pop("path_column", None)
    images: list[PackedImages | TarImages] = []
    rows: list[dict[str, str]] = []
    splits: list[str] = []
    for path, meaning in shards:
        part, labels, lonely = _read_shard(path, in_chans, endings)
        images.append(part)
        rows += labels
        splits += [meaning] * len(labels)
        if lonely:
            key = "samples without an image"
            left_out[key] = left_out.get(key, 0) + lonely
    if not rows:
        raise ValueError(f"{source} has no images{'' if endings is None else f' {endings!r}'}.")
    fields: dict[str, None] = {}
    for row in rows:
        fields |= dict.fromkeys(row)
    if not columns.get("levels") and "cls" in fields:
        columns["levels"] = ["cls"]  # as timm does
    cells: dict[str, list[str]] = {}
    for field in fields:
        cells[field] = [row.get(field, "") for row in rows]
    joined = JoinedImages(images)
    cells["__key__"] = joined.names.tolist()
    table = Table(source, cells, range(len(rows)))
    labelled = label_table(table, taxonomy, path_column="__key__", **columns).source
    labelled.summary.left_out |= left_out
    labelled.images = joined
    if labelled.splits is None:
        labelled.splits = np.array(splits)
    return labelled


def _find_shards(name: str, source: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """The shards, each with its split, and how many are left out."""
    if "://" in name or name.startswith("pipe:"):
        raise ValueError(
            f"{source} is not on this machine, and has no random access from here: download the "
            "shards, and give their folder."
        )
    left_out: dict[str, int] = {}
    if os.path.isdir(name):
        listed_shards = _shards_of_info(name, left_out)
        if listed_shards:
            return listed_shards, left_out
        paths = sorted(glob.glob(os.path.join(glob.escape(name), "*.tar")))
    elif "{" in name:
        from webdataset.shardlists import expand_urls

        paths = expand_urls(name)
    else:
        paths = sorted(glob.glob(name))
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing or not paths:
        what = listed(missing) if missing else name
        raise FileNotFoundError(f"{source}: there are no shards {what}.")
    meanings = [split_of(_bare(path)) for path in paths]
    if None in meanings and set(meanings) != {None}:
        odd = paths[meanings.index(None)]
        raise ValueError(
            f"{source}: {os.path.basename(odd)} is named after no split, others are. Rename it "
            "(train-000.tar), or give the shards of one split: wds/FOLDER/train-*.tar."
        )
    return [(path, meaning or "train") for path, meaning in zip(paths, meanings, strict=True)], {}


def _bare(path: str) -> str:
    """`train` of shards/photos-train-000.tar.gz: the last word before the number."""
    words = os.path.basename(path).split(".")[0].replace("_", "-").split("-")
    named = [word for word in words if word and not word.isdigit() and split_of(word)]
    return named[-1] if named else words[0]


def _shards_of_info(folder: str, left_out: dict[str, int]) -> list[tuple[str, str]]:
    """The shards that timm's `info.json` lists, by split; none without such a file."""
    shards = []
    for file in ("_info.json", "info.json"):
        path = os.path.join(folder, file)
        if not os.path.isfile(path):
            continue
        with open(path, encoding="utf-8") as text:
            splits = json.load(text).get("splits", {})
        for split, part in splits.items():
            meaning = split_of(split)
            for name in part["filenames"]:
                if not os.path.isfile(os.path.join(folder, name)):
                    raise FileNotFoundError(f"{path} lists {name}, which is not there.")
                if meaning is not None:
                    shards.append((os.path.join(folder, name), meaning))
            if meaning is None:
                left_out[f"shards of {split!r}, which is no split"] = len(part["filenames"])
        break
    return shards


def _read_shard(
    path: str, in_chans: int, endings: str | None
) -> tuple[PackedImages | TarImages, list[dict[str, str]], int]:
    """A shard's images, the fields of each, and how many samples have no image."""
    names, images = open_tar(path, in_chans)
    fields = _read_fields(path)
    wanted = None if endings is None else endings.replace(",", ";").split(";")
    chosen: dict[str, int] = {}
    for place, name in enumerate(names):
        key, ending = _key_and_ending(name)
        fits = "." not in ending if wanted is None else ending in wanted
        if not fits:
            continue
        if key in chosen:
            raise ValueError(
                f"{path}: the sample {key!r} has several images, {names[chosen[key]]} and {name}. "
                "Name the ending of one: path_column= (--input-key), such as 'jpg'."
            )
        chosen[key] = place
    lonely = len(fields.keys() - chosen.keys())
    rows = [fields.get(key, {}) for key in chosen]
    return images.select(list(chosen.values())), rows, lonely


def _key_and_ending(name: str) -> tuple[str, str]:
    """A member's name up to the first dot of its last part, and what is behind, as WebDataset."""
    folder, _, last = name.rpartition("/")
    stem, _, ending = last.partition(".")
    return f"{folder}/{stem}" if folder else stem, ending.lower()


def _read_fields(path: str) -> dict[str, dict[str, str]]:
    """The `.json` and `.cls` of each sample, as the cells of a row."""
    fields: dict[str, dict[str, str]] = {}
    with tarfile.open(path, "r|*") as tar:
        for info in tar:
            name = os.path.normpath(info.name).replace(os.sep, "/")
            key, ending = _key_and_ending(name)
            if not info.isfile() or ending not in ("json", "cls"):
                continue
            text = tar.extractfile(info).read()  # type: ignore[union-attr]
            known = fields.get(key, {})
            try:
                if ending == "cls":  # wins over a field of that name
                    fields[key] = known | _cells_of({"cls": text.decode()})
                else:
                    fields[key] = _cells_of(json.loads(text)) | known
            except (UnicodeDecodeError, ValueError, AttributeError) as error:
                raise ValueError(
                    f"{path}: {name} is no text or no JSON object ({error})."
                ) from error
    return fields


def _cells_of(content: Mapping[str, Any]) -> dict[str, str]:
    """The fields that may be labels, as texts; a number below 0 is unknown, as in timm."""
    cells = {}
    for key, value in content.items():
        if isinstance(value, str | int | float):
            text = str(value).strip()
            cells[key] = "" if text.startswith("-") and text[1:].isdigit() else text
        elif value is None:
            cells[key] = ""
    return cells
