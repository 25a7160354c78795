"""Trees of hypernyms, read by nltk's own reader from a tiny WordNet in WordNet's file format."""

import sys

import pytest

from timm_branches.taxonomy import Taxonomy

nltk = pytest.importorskip("nltk.corpus") and sys.modules["nltk"]
# they need a corpus of their own
pytestmark = pytest.mark.filterwarnings("ignore:The multilingual functions")

# synset -> its lemmas, its hypernyms; a lemma's senses are numbered in this order
NOUNS = {
    "entity": (["entity"], []),
    "thing": (["thing"], ["entity"]),
    "organism": (["organism", "being"], ["thing"]),
    "animal": (["animal"], ["organism"]),
    "domestic": (["domestic_animal"], ["animal"]),
    "canine": (["canine"], ["animal"]),
    "wild canine": (["wild_canine"], ["canine"]),
    # the second chain is the shorter one
    "dog": (["dog", "domestic_dog"], ["wild canine", "domestic"]),
    "poodle": (["poodle"], ["dog"]),
    "wolf": (["wolf"], ["wild canine"]),
    "bird": (["bird"], ["animal"]),
    "crane bird": (["crane"], ["bird"]),
    "artifact": (["artifact"], ["thing"]),
    "crane machine": (["crane"], ["artifact"]),
    "tower crane": (["tower_crane"], ["crane machine"]),
    "dock crane": (["dock_crane"], ["crane machine"]),
    "seat": (["chair"], ["artifact"]),
    "office": (["chair"], ["artifact"]),
    "stool": (["stool"], ["seat"]),
    "throne": (["throne"], ["seat"]),
    "dean": (["dean"], ["office"]),
    "rector": (["rector"], ["office"]),
}


def write_wordnet(folder):
    """The files nltk reads (wndb(5WN)); returns each synset's offset in data.noun."""

    def lines(offsets):
        for name, (lemmas, above) in NOUNS.items():
            words = " ".join(f"{lemma} 0" for lemma in lemmas)
            pointers = "".join(f" @ {offsets[key]:08d} n 0000" for key in above)
            counted = f"{len(lemmas):02x} {words} {len(above):03d}{pointers}"
            yield f"{offsets[name]:08d} 03 n {counted} | {name}\n"

    offsets, at = {}, 0
    for name, line in zip(NOUNS, lines(dict.fromkeys(NOUNS, 0)), strict=True):
        offsets[name], at = at, at + len(line)
    senses = {}
    for name, (lemmas, _) in NOUNS.items():
        for lemma in lemmas:
            senses.setdefault(lemma, []).append(offsets[name])
    for kind in ("noun", "verb", "adj", "adv"):
        for file in (f"data.{kind}", f"index.{kind}", f"{kind}.exc"):
            (folder / file).write_text("")
    (folder / "index.sense").write_text("")
    (folder / "noun.exc").write_text("wolves wolf\n")
    (folder / "data.noun").write_text("".join(lines(offsets)))
    (folder / "index.noun").write_text(
        "".join(
            f"{lemma} n {len(found)} 1 @ {len(found)} 0 "
            f"{' '.join(f'{offset:08d}' for offset in found)}\n"
            for lemma, found in sorted(senses.items())
        )
    )
    (folder / "lexnames").write_text("".join(f"{i:02d}\tname{i}\t1\n" for i in range(45)))
    return offsets


def use_data_of(folder, monkeypatch):
    """As if nltk had just been imported, with its data here."""
    reader = nltk.corpus.reader.wordnet.WordNetCorpusReader
    monkeypatch.setattr(nltk.data, "path", [str(folder)])
    monkeypatch.setattr(
        nltk.corpus, "wordnet", nltk.corpus.util.LazyCorpusLoader("wordnet", reader, None)
    )


@pytest.fixture
def offsets(tmp_path, monkeypatch):
    use_data_of(tmp_path, monkeypatch)
    folder = tmp_path / "corpora" / "wordnet"
    folder.mkdir(parents=True)
    return write_wordnet(folder)


def paths(classes):
    return ["/".join(leaf) for leaf in Taxonomy.from_wordnet(classes).leaves]


@pytest.mark.usefixtures("offsets")
class TestTree:
    def test_shortest_chain_without_single_children(self):
        # entity and thing are above all; canine has only wild_canine below it, and that only the
        # wolf
        assert paths(["wolf", "poodle", "bird", "stool"]) == [
            "animal/wolf",
            "animal/poodle",
            "animal/bird",
            "stool",
        ]

    def test_levels_and_order(self):
        tree = Taxonomy.from_wordnet(["stool", "wolf", "bird"], ["kind", "name"])
        assert tree.levels == ("kind", "name")
        assert tree.leaf_names == ("stool", "wolf", "bird")
        assert tree.leaf_table.tolist() == [[0, -1], [1, 0], [1, 1]]

    def test_a_class_above_another_is_a_leaf_of_its_own_node(self):
        assert paths(["poodle", "dog", "wolf"]) == ["dog/poodle", "dog/dog", "wolf"]
        assert paths(["dog.n.01", "poodle"]) == ["dog.n.01", "poodle"]
        tree = Taxonomy.from_wordnet(["poodle", "dog", "wolf"])
        assert tree.encode(["dog", "wolf"]).tolist() == [1, 2]

    def test_siblings_of_one_name(self):
        assert paths(["stool", "throne", "dean", "rector"]) == [
            "chair.n.01/stool",
            "chair.n.01/throne",
            "chair.n.02/dean",
            "chair.n.02/rector",
        ]
        assert paths(["stool", "throne", "chair.n.02", "wolf"]) == [
            "artifact/chair/stool",
            "artifact/chair/throne",
            "artifact/chair.n.02",
            "wolf",
        ]

    def test_a_single_class(self):
        assert paths(["dog"]) == paths("dog") == ["dog"]
        with pytest.raises(ValueError, match="at least one leaf"):
            paths([])

    def test_lemmas_lose_their_underscores(self):
        assert paths(["wolf", "wild_canine", "bird"]) == [
            "wild canine/wolf",
            "wild canine/wild_canine",
            "bird",
        ]


class TestClasses:
    def test_spellings(self, offsets):
        reader = nltk.corpus.wordnet
        dog = f"n{offsets['dog']:08d}"
        assert paths([dog, "wolf"]) == [dog, "wolf"]
        assert paths([reader.synset("dog.n.01"), "wolf"]) == ["dog.n.01", "wolf"]
        assert paths(["domestic dog", "wolf"]) == ["domestic dog", "wolf"]
        assert paths(["wolves", "dog"]) == ["wolves", "dog"]
        # the first sense
        assert paths(["crane", "bird", "wolf"]) == ["bird/crane", "bird/bird", "wolf"]

    @pytest.mark.parametrize(
        ("classes", "message"),
        [
            (["dog", "dogo"], "no noun 'dogo'"),
            (["dog.n.02"], "no synset 'dog.n.02'"),
            (["dogo.n.01"], "no synset 'dogo.n.01'"),
            (["n00000007"], "no synset 'n00000007'"),
            ([""], "no noun ''"),
            ([3], "a class is a word"),
            (["dog", "domestic dog"], "'dog' and 'domestic dog' both mean dog.n.01"),
            (["dog", "dog"], "both mean"),
        ],
    )
    @pytest.mark.usefixtures("offsets")
    def test_errors(self, classes, message):
        with pytest.raises(ValueError, match=message):
            paths(classes)


def test_missing_data(tmp_path, monkeypatch):
    use_data_of(tmp_path, monkeypatch)
    with pytest.raises(LookupError, match="python -m nltk.downloader wordnet") as caught:
        paths(["dog"])
    assert not isinstance(caught.value, (KeyError, IndexError))


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk.corpus", None)
    with pytest.raises(ImportError, match="pip install nltk"):
        paths(["dog"])
