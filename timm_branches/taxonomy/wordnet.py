"""The tree of hypernyms above a set of classes, read from WordNet through nltk.

Documented at `Taxonomy.from_wordnet`, which calls :func:`read_wordnet`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import Any

from timm_branches.taxonomy.paths import NodePath

__all__ = ["read_wordnet"]

_Node = dict[str, Any]  # synset name -> node below; under '' a leaf's index


def read_wordnet(classes: Iterable[Any]) -> list[NodePath]:
    """The leaves, one for each class."""
    items = [classes] if isinstance(classes, str) else list(classes)
    wordnet = _load()
    try:
        synsets = [_look_up(wordnet, item) for item in items]
        chains = [min(synset.hypernym_paths(), key=len) for synset in synsets]
    except LookupError as error:
        raise _missing_data(error) from error
    labels = []
    for item in items:
        labels.append(item if isinstance(item, str) else item.name())
    first: dict[str, str] = {}
    lemmas: dict[str, str] = {}
    root: _Node = {}
    for i, chain in enumerate(chains):
        node = root
        for synset in chain:
            node = node.setdefault(synset.name(), {})
            lemmas[synset.name()] = synset.lemma_names()[0].replace("_", " ")
        if "" in node:
            raise ValueError(
                f"{first[chain[-1].name()]!r} and {labels[i]!r} both mean {chain[-1].name()} in "
                "WordNet; give the synset that is meant, such as 'crane.n.04'."
            )
        node[""] = i
        first[chain[-1].name()] = labels[i]
    paths: dict[int, NodePath] = {}
    if items:
        _name_below("", root, (), labels, lemmas, paths)
    return [paths[i] for i in range(len(items))]


def _name_below(
    name: str,
    node: _Node | int,
    path: NodePath,
    labels: list[str],
    lemmas: dict[str, str],
    paths: dict[int, NodePath],
) -> None:
    """Write the paths of all leaves below a node whose own path is `path`."""
    name, node = _skip_single(name, node)
    if isinstance(node, int):  # there is only one class
        paths[node] = (*path, labels[node])
        return
    children = [_skip_single(key, child) for key, child in node.items()]
    titles = []
    for key, child in children:
        titles.append(labels[child] if isinstance(child, int) else lemmas[key])
    for (key, child), title in zip(children, titles, strict=True):
        if isinstance(child, int):
            paths[child] = (*path, title)
        else:
            here = title if titles.count(title) == 1 else key
            _name_below(key, child, (*path, here), labels, lemmas, paths)


def _skip_single(name: str, node: _Node | int) -> tuple[str, _Node | int]:
    """The node itself, or what lies below it where that is a single thing."""
    while isinstance(node, dict) and len(node) == 1:
        [(name, node)] = node.items()
    return name, node


def _load() -> Any:
    try:
        from nltk.corpus import wordnet
    except ImportError as error:
        raise ImportError(
            f"Taxonomy.from_wordnet needs nltk, which is not installed ({error}). Install it with: "
            "pip install nltk."
        ) from error
    try:
        wordnet.ensure_loaded()
    except LookupError as error:
        raise _missing_data(error) from error
    return wordnet


def _missing_data(error: LookupError) -> LookupError:
    if isinstance(error, (KeyError, IndexError)):
        return error
    return LookupError(
        "nltk is installed, but WordNet's data is not. Download it with: python -m nltk.downloader "
        "wordnet"
    )


def _look_up(wordnet: Any, item: Any) -> Any:
    """The synset that is meant by a synset, its name, an ImageNet id or a word."""
    if hasattr(item, "hypernym_paths"):
        return item
    if not isinstance(item, str):
        raise ValueError(
            "a class is a word, a synset's name like 'dog.n.01', an ImageNet id like 'n02084071' "
            f"or a synset of nltk; got {item!r}."
        )
    if re.fullmatch(r"[nvars]\d{8}", item):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # we say it ourselves
            found, what = wordnet.synset_from_pos_and_offset(item[0], int(item[1:])), "synset"
    elif re.fullmatch(r".+\.[nvars]\.\d+", item):
        from nltk.corpus.reader.wordnet import WordNetError

        try:
            found, what = wordnet.synset(item), "synset"
        except WordNetError:
            found, what = None, "synset"
    else:
        found, what = (
            next(iter(wordnet.synsets(item.strip().replace(" ", "_"), pos="n")), None),
            "noun",
        )
    if found is None:
        raise ValueError(f"WordNet has no {what} {item!r}.")
    return found
