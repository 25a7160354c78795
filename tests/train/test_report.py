"""`report.html`: what it says, that nothing breaks it, and how a browser shows it."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from timm_branches import Taxonomy, create_branch_model
from timm_branches.data import HierarchicalDataset
from timm_branches.task import BranchTask
from timm_branches.train.report import Answers, examine, report_page, write_report

NASTY = "<b>&\"'猫\udcff"
TREE = Taxonomy([("animal", "cat"), ("animal", NASTY), ("plant", "rose")], ["kind", "name"])
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def answers_by_hand():
    """Six samples: four right, one in the wrong class, one in the wrong kind."""
    images = np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)
    labels = torch.tensor([[0, 0], [0, 0], [0, 1], [1, 2], [0, 1], [1, 2]])
    said = torch.tensor([[0, 0], [0, 0], [0, 1], [1, 2], [0, 0], [0, 0]])
    confidences = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.99])
    return Answers(
        taxonomy=TREE,
        dataset=HierarchicalDataset(images, labels, TREE),
        decoder="best-path",
        labels=labels,
        predictions=said,
        confidences=confidences,
        positions=torch.arange(6),
        left_out={f"{NASTY}.jpg": "it is cut"},
        mean=(0.0,),
        std=(1.0,),
    )


def history(epochs=4):
    rows = []
    for epoch in range(epochs):
        row = {"epoch": epoch, "lr": 0.1, "train_loss": 1 / (1 + epoch)}
        rows.append({**row, "eval_kind_top1": 50.0 + epoch, "eval_name_top1": 30.0 + epoch})
    return rows


def page_of(folder, **changes):
    options = {
        "title": f"A run on {NASTY}",
        "results": {NASTY: [{"top1": 50.0}, {"top1": 60.0}], "flat": [{"top1": float("nan")}]},
        "columns": {"top1": "top-1"},
        "closing": "One sentence.",
        "histories": {"B-CNN": history()},
        "answers": answers_by_hand,
        "settings": {"model": "x" * 500, "data": NASTY},
        "device": torch.device("cpu"),
    }
    return report_page(folder, **{**options, **changes})


class Outline(HTMLParser):
    """Checks that tags match, and keeps texts and addresses."""

    def __init__(self, page):
        super().__init__()
        self.open, self.texts, self.addresses, self.tags = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_what_it_says(tmp_path):
    outline = Outline(page_of(tmp_path))
    words = " ".join(outline.texts)
    for said in (
        "55.00 ± 7.07",  # mean and deviation of 50 and 60
        "One sentence.",
        "100.0 % of 2",  # cat
        "50.0 % of 2",  # the nasty name, and rose
        "plant / rose",
        "it is cut",
        "timm_branches",
        "best-path",
    ):
        assert said in words, said
    assert "script" not in outline.tags
    assert "b" in outline.tags  # of the cards, not of the name
    assert all(address.startswith("data:image/") for address in outline.addresses)
    assert "<b>&" not in page_of(tmp_path)
    assert "猫" in words


def test_mistakes_by_cost():
    answers = answers_by_hand()
    assert answers.distances().tolist() == [0, 0, 0, 0, 1, 2]
    costs = [count * distance for *_, count, distance in answers.confusions()]
    assert costs == [2, 1]
    best, worst = answers.extremes(2)
    assert best == [0, 1]
    assert worst == [5, 4]  # the farthest first


def test_epochs_count_from_one(tmp_path):
    (log,) = re.findall(r"epoch by epoch.*?</details>", page_of(tmp_path), re.DOTALL)
    first_cells = re.findall(r"<tr><td>(.*?)</td>", log)
    assert first_cells == ["1", "2", "3", "4"]


def test_a_large_tree_is_shown_in_part():
    paths = [(f"group {i // 100}", f"leaf {i}") for i in range(10_000)]
    tree = Taxonomy(paths, ["group", "leaf"])
    labels = tree.expand(torch.arange(10_000))
    answers = answers_by_hand()
    large = Answers(**{**vars(answers), "taxonomy": tree, "labels": labels, "predictions": labels})
    from timm_branches.train.report.tree import tree_outline

    outline = tree_outline(large)
    assert len(outline) < 2_000_000
    assert "others" in outline


def test_answers_of_a_model():
    """Against the model itself, asked for one image after the other."""
    torch.manual_seed(0)
    model = create_branch_model("test_resnet", taps=[3, 5], taxonomy=TREE, img_size=32).eval()
    images = np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), dtype=np.uint8)
    labels = torch.tensor([[0, 0], [0, 1], [1, 2], [0, -1], [-1, -1]])
    data = HierarchicalDataset(images, labels, TREE)
    answers = examine(BranchTask(model, verbose=False), data, 2, "independent")
    with torch.no_grad():
        for index in range(5):
            outputs = model(data[index][0][None])
            expected = [int(outputs[level].argmax()) for level in TREE.levels]
            assert answers.predictions[index].tolist() == expected
    assert answers.labels.tolist() == labels.tolist()
    assert answers.pixels(0).shape == (32, 32, 3)


def test_a_report_that_fails_costs_no_run(tmp_path, caplog):
    def broken():
        raise RuntimeError("no such luck")

    assert write_report(tmp_path, "a", {}, {}, answers=broken) is None
    assert "no such luck" in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1366, 390])
def test_in_a_browser(tmp_path, width):
    """Nothing is wider than the window but what scrolls in a box of its own."""
    page = page_of(tmp_path)
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    # an outer page of the width measures the inner one: windows have a least width
    (tmp_path / "outer.html").write_text(
        f'<iframe id="it" src="report.html" style="width:{width}px;height:900px;border:0"></iframe>'
        "<script>onload = () => {"
        "const inner = document.getElementById('it').contentDocument;"
        "const root = inner.documentElement;"
        "const broken = [...inner.images].filter(i => !i.naturalWidth).length;"
        "document.title = [root.scrollWidth, root.clientWidth, broken, inner.images.length,"
        " inner.querySelectorAll('section').length].join(' '); };</script>"
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu"]
    command += ["--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=5000", "--dump-dom", (tmp_path / "outer.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    (title,) = re.findall("<title>(.*?)</title>", done.stdout)
    wide, visible, broken, images, sections = map(int, title.split())
    assert wide <= visible <= width
    assert broken == 0
    assert images >= 7  # curves, and a thumbnail of each sample
    assert sections >= 6
