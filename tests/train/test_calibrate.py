"""A model's calibration: fitted, kept in its file, used, and held against new data."""

import json
import math
import re

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image

from timm_branches import (
    LSTMHead,
    Taxonomy,
    create_branch_model,
    load_model,
    save_model,
    save_pretrained,
)
from timm_branches.cli import main
from timm_branches.data import HierarchicalDataset, create_loader
from timm_branches.hierarchy import cost_decoder
from timm_branches.hierarchy.calibration import Calibration, information, is_wrong
from timm_branches.hierarchy.novelty import nearest_node, stop_probabilities
from timm_branches.inference import predict
from timm_branches.inference.calibrated import (
    CalibratedEvaluator,
    binomial_tail,
    kolmogorov_smirnov,
    model_calibration,
)
from timm_branches.train import calibrate
from timm_branches.weights import read_metadata

TREE = Taxonomy(["warm/red", "warm/yellow", "cold/blue", "cold/green"], levels=["kind", "name"])
COLOURS = np.array([[200, 60, 60], [190, 150, 60], [60, 60, 200], [60, 160, 100]])


def draw(random, count):
    """Noisy patches of four colours, some of which look alike."""
    leaf = random.integers(0, 4, count)
    pixels = COLOURS[leaf][:, None, None] + random.normal(0, 110, (count, 1, 1, 3))
    return np.broadcast_to(pixels.clip(0, 255), (count, 32, 32, 3)).astype(np.uint8), leaf


def batches(count, seed):
    pixels, leaf = draw(np.random.default_rng(seed), count)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return [2 * images - 1], [TREE.expand(torch.from_numpy(leaf))]


@pytest.fixture(scope="module")
def trained():
    """A head a level, trained for a moment."""
    torch.manual_seed(0)
    model = create_branch_model("test_resnet", taps=[4, 5], taxonomy=TREE, img_size=32)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(40):
        [images], [labels] = batches(64, 100 + step)
        output = model(images)
        loss = sum(
            torch.nn.functional.cross_entropy(y, t)
            for y, t in zip(output.values(), labels.T, strict=True)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def model(trained, tmp_path):
    return load_model(save_model(trained, tmp_path / "trained.safetensors"))


def loader(count, seed):
    return list(zip(*batches(count, seed), strict=True))


@pytest.fixture
def photos(tmp_path):
    random = np.random.default_rng(5)
    for split, count in (("val", 80), ("test", 80)):
        pixels, leaf = draw(random, count)
        for i, (image, at) in enumerate(zip(pixels, leaf, strict=True)):
            folder = tmp_path.joinpath("photos", split, *TREE.leaves[at])
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i}.png")
    return tmp_path / "photos"


def test_what_is_promised_is_kept(model):
    found = calibrate(model, loader(600, 1), 0.9, data="patches")
    assert found.count == 600
    assert not found.absent
    assert model.calibration == found.to_dict()
    [(images, labels)] = loader(2000, 2)
    with torch.inference_mode():
        output = model(images)
    answers = found.answer(list(output.values()), TREE).prediction.labels
    right = (~is_wrong(answers, labels)).double().mean().item()
    # both samples have a standard error, of 1.2 and 0.7 points
    assert 0.86 < right < 0.94
    depths = (answers >= 0).sum(1).bincount(minlength=3)
    assert (depths > 0).all(), "all kinds of answers occur"
    evaluator = CalibratedEvaluator(found, TREE, lambda output: list(output.values()))
    for part in torch.arange(2000).split(300):
        evaluator.update({k: v[part] for k, v in output.items()}, labels[part])
    metrics = evaluator.compute()
    assert metrics["answers_right"] == pytest.approx(100 * right)
    assert metrics["information"] == pytest.approx(100 * information(answers, TREE).mean().item())
    ends = [metrics[f"answers_{name}"] for name in ("none", "at_kind", "at_name")]
    assert ends == pytest.approx((100 * depths / 2000).tolist())
    assert evaluator.warnings() == []


def test_data_of_another_kind_are_told(model):
    found = calibrate(model, loader(600, 1), 0.95)
    evaluator = CalibratedEvaluator(found, TREE, lambda output: list(output.values()))
    [(images, labels)] = loader(500, 2)
    with torch.inference_mode():
        evaluator.update(model(images.flip(1)), labels)  # blue for red
        evaluator.update(model(2 * images), labels.roll(1, 0))
    promise, drift = evaluator.warnings()
    assert promise.startswith("95 % right was promised, and ")
    assert "otherwise than of those of its calibration" in drift


def test_file(model, tmp_path, caplog):
    found = calibrate(model, loader(200, 1), 0.8)
    path = save_model(model, tmp_path / "model.safetensors")
    for place in (path, save_pretrained(model, tmp_path / "hub")):
        loaded = load_model(place)
        assert model_calibration(loaded, TREE) == found
    assert not caplog.records
    # trained on in one's own loop
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    assert model_calibration(model, TREE) is None
    assert "weights have changed since it was calibrated" in caplog.text
    save_model(model, path)
    assert "is written without its calibration" in caplog.text
    assert load_model(path).calibration is None
    # new last layers
    loaded.reset_classifier([2, 4], taxonomy=TREE)
    assert loaded.calibration is None


def test_no_answer_is_kept_as_such(model, tmp_path, caplog):
    found = calibrate(model, loader(10, 1), 0.95)
    assert found.thresholds == ((math.inf,) * 2,)
    assert "10 samples are too few to promise 95 %" in caplog.text
    save_model(model, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors")
    [record] = predict(loaded, torch.zeros(3, 32, 32))
    assert record.path == ()
    assert record.stopped


@pytest.mark.parametrize(
    "change",
    [
        {"decoder": "crm"},
        {"temperature": 0},
        {"temperature": "hot"},
        {"thresholds": [[0.5]]},
        {"thresholds": [[0.5, float("nan")]]},
        {"thresholds": [[-1, 0.5]]},
        {"targets": {"": 95}},
        {"targets": {"family": 0.9}},
        {"by": "family"},
        {"confidences": [2.0]},
        {"confidences": []},
        {"confidences": [0.9, 0.1]},
        {"count": "many"},
        {"count": 0},
        {"count": 1.5},
        {"right": 7.0},
        {"information": float("nan")},
        {"targets": {}},
        {"targets": {"": 0.9, "kind": 0.9}},
        {"absent": [1]},
        {"data": {}},
        {"weights": 3},
        {"temperature": True},
        {"temperature": 1e-300},
        {"thresholds": [[0.5, 1.5]]},
        {"tree": "0"},
        {"more": 1},
    ],
    ids=str,
)
def test_a_strangers_calibration(model, change):
    calibrate(model, loader(60, 1), 0.8)
    assert Calibration.from_dict(model.calibration, TREE)
    with pytest.raises(ValueError, match=r"calibration.*\.$"):
        Calibration.from_dict({**model.calibration, **change}, TREE)
    with pytest.raises(ValueError, match="no calibration"):
        Calibration.from_dict([1], TREE)
    other = Taxonomy([*reversed(TREE.leaves)], levels=TREE.levels)
    with pytest.raises(ValueError, match="another order"):
        Calibration.from_dict(model.calibration, other)


def test_predict(model, photos):
    files = sorted(photos.rglob("*.png"))
    plain = list(predict(model, files))
    found = calibrate(model, loader(600, 1), 0.95)
    predictions = predict(model, files)
    assert predictions.calibration == found
    records = list(predictions)
    assert any(record.stopped for record in records)
    for record, before in zip(records, plain, strict=True):
        assert before.path[: len(record.path)] == record.path
        assert list(record.probabilities) == sorted(record.probabilities, reverse=True)
    for options in ({"calibrated": False}, {"threshold": 0.0}, {"decoder": "best-path"}):
        other = predict(model, files, **options)
        assert other.calibration is None
        assert [record.path for record in other] == [record.path for record in plain]
        assert other.drift() is None
    assert predictions.drift() is None
    list(predict(model, files[:3]))


def test_command_line(model, photos, tmp_path, capsys):
    path = str(tmp_path / "trained.safetensors")
    assert main(["calibrate", path, str(photos), "--target", "0.9"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("right on 90 %; on these 80 images: down to name for ")
    kept = json.loads(read_metadata(path)["calibration"])
    assert kept["data"] == f"{photos}, val"
    assert kept["count"] == 80
    assert main(["info", path]) == 0
    assert json.loads(capsys.readouterr().out)["calibration"]["targets"] == {"": 0.9}
    assert main(["predict", path, str(photos / "test")]) == 0
    out, err = capsys.readouterr()
    assert "(stopped)" in out
    assert f"calibrated on {photos}, val: right on 90 %" in err
    assert main(["predict", path, str(photos / "test"), "--no-calibration"]) == 0
    out, err = capsys.readouterr()
    assert "(stopped)" not in out
    assert "calibration is not used" in err
    shown = tmp_path / "pictures"
    evaluated = ["evaluate", path, str(photos), "--format", "json", "--pictures", str(shown)]
    assert main(evaluated) == 0
    assert (shown / "coverage.png").stat().st_size > 5000
    results = json.loads(capsys.readouterr().out)
    assert results["calibrated"].startswith("right on 90 %; down to name for ")
    assert 75 < results["metrics"]["answers_right"] <= 100
    metrics = results["metrics"]
    assert metrics["information@90"] >= metrics["information@95"] >= 0
    assert main(["evaluate", path, str(photos), "--no-calibration", "--format", "json"]) == 0
    assert "calibrated" not in json.loads(capsys.readouterr().out)


def test_command_line_by_level_and_class(model, photos, tmp_path, capsys):
    path = str(tmp_path / "trained.safetensors")
    other = str(tmp_path / "other.safetensors")
    command = ["calibrate", path, str(photos), "--output", other]
    assert main([*command, "--target", "kind=0.95", "name=0.6"]) == 0
    assert capsys.readouterr().out.startswith("kind right on 95 %, name right on 60 %; ")
    assert load_model(path).calibration is None
    assert main([*command, "--target", "0.8", "--by", "kind"]) == 0
    assert "right on 80 % of each kind" in capsys.readouterr().out
    assert len(load_model(other).calibration["thresholds"]) == 3
    for arguments, message in (
        (["--target", "95"], "between 0 and 1, such as 0.95, got 95"),
        (["--target", "high"], "--target high: give a share"),
        (["--target", "0.9", "kind=0.8"], "one share, or one a level"),
        (["--target", "=0.9", "kind=0.8"], "one share, or one a level"),
        (["--target", "family=0.8"], "family"),
        (["--by", "family"], "family"),
        (["--target", "kind=0.8", "--by", "kind"], "without by="),
        (["--split", "train"], "train"),
    ):
        assert main([*command, *arguments]) == 2
        assert message in capsys.readouterr().err


def test_flat_model(photos, tmp_path, capsys):
    flat = create_branch_model("test_resnet", taps=[5], num_classes=4, img_size=32)
    path = str(save_model(flat, tmp_path / "flat.safetensors"))
    TREE.save_json(tmp_path / "tree.json")
    tree = ["--taxonomy", str(tmp_path / "tree.json")]
    assert main(["calibrate", path, str(photos)]) == 2
    assert "give --taxonomy" in capsys.readouterr().err
    assert main(["calibrate", path, str(photos), "--target", "0.7", *tree]) == 0
    capsys.readouterr()
    assert main(["predict", path, str(photos / "test"), *tree]) == 0
    assert "calibrated on" in capsys.readouterr().err


def test_frames_make_no_promise():
    head = LSTMHead(hidden_size=4, output="frame")
    model = create_branch_model("test_resnet", taps=[4, 5], head=head, taxonomy=TREE, img_size=32)
    with pytest.raises(ValueError, match="not independent"):
        calibrate(model, [])


def test_against_scipy():
    for successes, count, share in ((0, 5, 0.5), (80, 100, 0.9), (1900, 2000, 0.95), (7, 7, 0.1)):
        want = scipy.stats.binom.cdf(successes, count, share)
        assert binomial_tail(successes, count, share) == pytest.approx(want, rel=1e-9)
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(400, generator=generator, dtype=torch.double)
    for shift in (0, 0.02, 0.1, 0.3):
        b = torch.rand(700, generator=generator, dtype=torch.double) + shift
        want = scipy.stats.kstwobign.sf(
            scipy.stats.ks_2samp(a, b).statistic * math.sqrt(400 * 700 / 1100)
        )
        assert kolmogorov_smirnov(a, b) == pytest.approx(want, abs=1e-9)


def test_answers_that_cost_least(model, photos, tmp_path, capsys):
    """By file and by name, with the calibrated temperature, as the functions give them."""
    path = str(tmp_path / "trained.safetensors")
    files = sorted((photos / "test").rglob("*.png"))
    calibrate(model, loader(600, 1), 0.9)
    save_model(model, path)
    rows = ["answer,truth,cost"]
    for leaf in TREE.leaf_names:
        rows += [f"{leaf},*,1", f"{leaf},{leaf},0"]
    rows += ["warm,warm,0.3", "warm,cold,2", "cold,cold,0.3", "cold,warm,2"]
    (tmp_path / "costs.csv").write_text("\n".join(rows))
    costs = str(tmp_path / "costs.csv")
    arguments = [path, str(photos / "test"), "--decoder", "cost", "--format", "json"]
    assert main(["predict", *arguments, "--costs", costs]) == 0
    said = {row["file"]: row for row in json.loads(capsys.readouterr().out)}
    calibration = model_calibration(model, TREE)
    decoder = cost_decoder(costs, TREE, calibration.decoder, calibration.temperature)
    for record in predict(model, files, decoder=decoder):
        named = [level["name"] for level in said[record.file]["levels"]]
        assert tuple(named) == record.path
    depths = {len(row["levels"]) for row in said.values()}
    assert depths == {1, 2}, "some stop at a kind, for 0.3, others name a leaf"
    evaluated = ["evaluate", path, str(photos), "--format", "json"]
    assert main([*evaluated, "--decoder", "cost", "--costs", costs]) == 0
    best = json.loads(capsys.readouterr().out)["metrics"]["cost"]
    assert main([*evaluated, "--decoder", "best-path", "--costs", costs]) == 0
    assert best < json.loads(capsys.readouterr().out)["metrics"]["cost"]
    assert main(["predict", *arguments[:2], "--costs", costs]) == 2
    assert "--costs has no effect without --decoder cost" in capsys.readouterr().err
    (tmp_path / "costs.csv").write_text("answer,truth,cost\nred,purple,1\n")
    assert main(["predict", *arguments, "--costs", costs]) == 2
    assert "purple" in capsys.readouterr().err


def test_something_new(model, photos, tmp_path, capsys):
    """Colours of no known class end above a leaf more often than those of a class."""
    pixels, _ = draw(np.random.default_rng(3), 60)
    known = [Image.fromarray(image) for image in pixels]
    records = list(predict(model, known, novel=True))
    for record in records:
        # an answer above a leaf is something new, or one of several known kinds
        assert (record.novelty is not None or record.stopped) == (len(record.path) < 2)
        assert not (record.novelty is not None and record.stopped)
        assert list(record.probabilities) == sorted(record.probabilities, reverse=True)
        if record.novelty is not None:
            assert 0 < record.novelty <= 1
    with torch.inference_mode():
        x = torch.stack([torch.from_numpy(p).permute(2, 0, 1) for p in pixels]).float() / 127.5 - 1
        stops = stop_probabilities(list(model(x).values()), TREE)
    for record, labels in zip(records, nearest_node(stops, TREE).labels, strict=True):
        assert record.labels == tuple(i for i in labels.tolist() if i >= 0)
    # none of them: the model is made to say so
    unsure = load_model(tmp_path / "trained.safetensors")
    for head in unsure.heads.values():
        torch.nn.init.zeros_(head.fc.weight)
        torch.nn.init.zeros_(head.fc.bias)
    unsure.head("kind").fc.bias.data[0] = 9.0  # warm
    path = str(save_model(unsure, tmp_path / "unsure.safetensors"))
    file = str(next(photos.rglob("*.png")))
    assert main(["predict", path, file, "--novel"]) == 0
    assert re.search(r"warm 1\.00 > \(unknown warm 0\.\d\d\)$", capsys.readouterr().out.strip())
    assert main(["predict", path, file, "--novel", "--format", "json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row["novelty"] == pytest.approx(0.5, abs=0.01)
    assert main(["predict", path, file, "--novel", "--format", "csv"]) == 0
    header, cells = capsys.readouterr().out.splitlines()
    assert header.endswith(",novelty")
    assert len(cells.split(",")) == len(header.split(","))
    for flags in (["--threshold", "0.5"], ["--decoder", "crm"]):
        assert main(["predict", path, file, "--novel", *flags]) == 2
        assert "answer of its own" in capsys.readouterr().err


def test_a_part_of_the_samples_is_refused(model):
    """Of several processes each would make a promise from its own part."""
    data = HierarchicalDataset(
        torch.zeros(8, 3, 32, 32), TREE.expand(torch.zeros(8, dtype=torch.long)), TREE
    )
    part = create_loader(data, 4, rank=1, world_size=2)
    with pytest.raises(ValueError, match="one of 2 parts of the samples"):
        calibrate(model, part)


def test_samples_without_a_leaf_are_not_judged(model):
    """A coarse label cannot say whether a finer answer is right."""
    found = calibrate(model, loader(600, 1), 0.9)
    [(images, labels)] = loader(300, 2)
    coarse = labels.clone()
    coarse[:100, 1], coarse[100:200] = -1, -1
    with torch.inference_mode():
        output = model(images)

    def fed(rows, labels):
        evaluator = CalibratedEvaluator(found, TREE, lambda output: list(output.values()))
        evaluator.update({name: y[rows] for name, y in output.items()}, labels[rows])
        return evaluator

    part = fed(slice(0, 300), coarse)
    assert part.compute() == pytest.approx(fed(slice(200, 300), labels).compute())
    assert not any("was promised" in warning for warning in part.warnings())
    nothing = fed(slice(0, 200), coarse)
    assert math.isnan(nothing.compute()["answers_right"])
    assert not any("was promised" in warning for warning in nothing.warnings())
