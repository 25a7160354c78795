"""``recipes/segment.py`` as a user runs it: a script, started from some other folder."""

import csv
import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.recipes.script import RECIPES, read_table, run_recipe
from timm_branches import Taxonomy, load_model

RECIPE = RECIPES / "segment.py"
NAMES = ("sky", "grass", "cat", "dog")
TINY = (
    "--model",
    "test_resnet",
    "--crop",
    "32",
    "--channels",
    "8",
    "8",
    "8",
    "8",
    "8",
    "-b",
    "2",
    "--epochs",
    "1",
    "--no-plots",
)
SMALL_JOB = ("--crop", "64", "--repeats", "8", "--epochs", "1", "--model", "test_resnet")


def write_pairs(root, images, masks, count=4, size=(40, 48), void=255):
    """Scenes that colour gives away.

    Sky above grass, and a cat or a dog; a frame of unlabelled pixels.
    """
    rng = np.random.default_rng(0)
    (root / images).mkdir(parents=True)
    (root / masks).mkdir(parents=True)
    for i in range(count):
        mask = np.zeros(size, np.uint8)
        mask[size[0] // 2 :] = 1
        mask[10:30, 12:36] = 2 + i % 2
        colours = np.array([[60, 120, 220], [40, 180, 40], [200, 120, 20], [90, 60, 30]])
        pixels = np.clip(colours[mask] + rng.integers(-5, 6, (*size, 3)), 0, 255).astype(np.uint8)
        mask[:2] = void
        Image.fromarray(pixels).save(root / images / f"{i}.png")
        Image.fromarray(mask).save(root / masks / f"{i}.png")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A data folder without test split, one with, names, a tree, and folders that are wrong."""
    root = tmp_path_factory.mktemp("scenes")
    for name in ("two", "three"):
        for part in ("train", "val", *(["test"] if name == "three" else [])):
            write_pairs(root / name, part, f"{part}annot", count=4 if part == "train" else 2)
    (root / "names.txt").write_text("\n".join(NAMES) + "\n")
    # in another order than the names
    (root / "tree.csv").write_text(
        "kind,thing\nanimal,dog\nanimal,cat\nscenery,grass\nscenery,sky\n"
    )
    (root / "odd").mkdir()
    for part in ("train", "val"):
        write_pairs(root / "odd", part, f"{part}annot", count=2)
    (root / "odd" / "train" / "9.png").write_bytes((root / "odd" / "train" / "0.png").read_bytes())
    return root


def own(scenes, name="two", classes=True):
    return (
        scenes / name,
        "--ignore-index",
        "255",
        *(("--classes", scenes / "names.txt") if classes else ()),
        *TINY,
    )


class TestWithoutArguments:
    @pytest.fixture(scope="class")
    def small(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("small")
        done = run_recipe(RECIPE, *SMALL_JOB, cwd=folder)
        assert done.returncode == 0, done.stderr
        return folder / "output" / "segment", done.stdout

    def test_table(self, small):
        columns, rows = read_table(small[1])
        assert columns == [
            "U-Net, test_resnet, all levels",
            "U-Net, test_resnet, flat",
            "colour alone",
            "colour and height",
        ]
        wanted = [
            f"{level} {what}" for what in ("mIoU", "pixel accuracy") for level in ("kind", "object")
        ]
        objects = (
            "kind IoU surroundings",
            "kind IoU vehicle",
            "object IoU wall",
            "object IoU floor",
            "object IoU motorcycle",
        )
        assert list(rows) == [*wanted, "full path", "consistency", *objects]
        assert all(0 <= x <= 100 for numbers in rows.values() for x in numbers)
        for level, mean in (("kind", rows["kind mIoU"]), ("object", rows["object mIoU"])):
            ious = [numbers for name, numbers in rows.items() if name.startswith(f"{level} IoU")]
            assert np.mean(ious, 0) == pytest.approx(mean, abs=0.011)
        assert "1 test image;" in small[1]
        assert "the best epoch on validation (1, 1)" in small[1]

    def test_files(self, small):
        folder, out = small
        facts = json.loads((folder / "results.json").read_text())
        columns, rows = read_table(out)
        assert list(facts["results"]) == columns
        for i, found in enumerate(facts["results"].values()):
            assert {name: numbers[i] for name, numbers in rows.items()} == pytest.approx(
                found, abs=0.006
            )
        assert (facts["judged"], facts["images"], facts["epoch"]) == (
            "test",
            1,
            dict.fromkeys(columns[:2], 0),
        )
        assert "--crop 64" in facts["command"]
        for name in ("pictures.png", "all_levels/history.png", "flat/confusion_object.png"):
            assert (folder / name).read_bytes().startswith(b"\x89PNG")

    def test_table_is_of_the_saved_model(self, small):
        """The printed IoU, from the file and pixels alone."""
        from timm_branches.dense import package_segmentation

        _, _, test = package_segmentation()
        for column, (folder, output) in enumerate((("all_levels", "object"), ("flat", "mask"))):
            model = load_model(small[0] / folder / "model.safetensors").eval()
            image, mask = test[0]
            mean, std = (
                torch.tensor(model.pretrained_cfg[key]).view(-1, 1, 1) for key in ("mean", "std")
            )
            with torch.no_grad():
                said = model(((image - mean) / std)[None])[output][0].argmax(0)
            said = said[mask >= 0]
            mask = mask[mask >= 0]
            ious = [
                100 * float(((said == k) & (mask == k)).sum() / ((said == k) | (mask == k)).sum())
                for k in range(3)
            ]
            printed = [
                row[column]
                for name, row in read_table(small[1])[1].items()
                if name.startswith("object IoU")
            ]
            assert printed == pytest.approx(ious, abs=0.02)


class TestOwnData:
    def test_says_and_keeps_what_was_understood(self, scenes, here, tmp_path):
        names = tmp_path / "names.txt"
        names.write_text("\n".join([*NAMES, "unicorn"]) + "\n")
        status, out, err = here(
            *own(scenes, "three", classes=False),
            "--classes",
            names,
            "--repeats",
            "3",
            "--value-range",
            "0",
            "255",
        )
        assert status == 0, err
        assert "train: 4 images of 5 classes\nval: 2 images of 5 classes\ntest: 2 images" in out
        warning = "1 of 5 classes is in no mask: 'unicorn'"
        assert f"warning: {warning}" in out
        model = load_model(tmp_path / "output" / "segment" / "model.safetensors")
        assert model.data_summary["splits"]["train"] == {"images": 4, "classes": 5}
        assert model.data_summary["warnings"] == [warning]
        # so that a prediction reads its images as training did
        assert tuple(model.pretrained_cfg["value_range"]) == (0, 255)

    def check_run(
        self, result, columns=("U-Net, test_resnet", "colour alone", "colour and height")
    ):
        status, out, err = result
        assert status == 0, err
        found, rows = read_table(out)
        assert tuple(found) == columns
        return rows, out

    def test_last_epoch_is_judged_on_validation(self, scenes, here, tmp_path):
        rows, out = self.check_run(here(*own(scenes), "--epochs", "2"))
        assert list(rows) == ["mIoU", "pixel accuracy", *(f"IoU {name}" for name in NAMES)]
        assert rows["IoU sky"][1] == 100  # colour alone tells the classes
        assert "2 validation images; model of the last epoch" in out
        assert json.loads((tmp_path / "output/segment/results.json").read_text())["epoch"] == {
            "U-Net, test_resnet": 1
        }
        # nothing was chosen on validation
        with open(tmp_path / "output/segment/log.csv", newline="") as stream:
            assert not any(key.startswith("eval_") for key in next(csv.DictReader(stream)))

    def test_with_a_test_split_validation_chooses(self, scenes, here):
        _, out = self.check_run(here(*own(scenes, "three")))
        assert "2 test images; model of the best epoch on validation (1)" in out

    def test_taxonomy_in_the_order_of_the_names(self, scenes, here, tmp_path):
        columns = (
            "U-Net, test_resnet, all levels",
            "U-Net, test_resnet, flat",
            "colour alone",
            "colour and height",
        )
        args = ("--taxonomy", scenes / "tree.csv", "--class-weights", "auto")
        rows, _ = self.check_run(here(*own(scenes), *args), columns)
        assert [name for name in rows if "IoU" in name] == [
            "kind mIoU",
            "thing mIoU",
            "kind IoU scenery",
            "kind IoU animal",
            *(f"thing IoU {name}" for name in NAMES),
        ]
        # colour alone tells all four, which the tree's own order would mix up
        assert rows["kind IoU animal"][2] > 99
        assert rows["thing IoU sky"][2] > 99
        assert rows["full path"][2] > 99
        model = load_model(tmp_path / "output/segment/all_levels/model.safetensors")
        assert {level: y.shape[1] for level, y in model(torch.zeros(1, 3, 32, 32)).items()} == {
            "kind": 2,
            "thing": 4,
        }
        assert load_model(tmp_path / "output/segment/flat/model.safetensors").taxonomy is None

    def test_images_and_masks(self, scenes, here):
        args = own(scenes)[1:]
        _, out = self.check_run(
            here(
                "--images",
                scenes / "two/train",
                "--masks",
                scenes / "two/trainannot",
                "--val-fraction",
                "0.25",
                "--repeats",
                "3",
                *args,
            )
        )
        assert "9 crops an epoch of 3 images" in out
        assert "1 validation image;" in out

    @pytest.mark.parametrize(
        "extra",
        [
            (
                "--attention",
                "--input-skip",
                "--deep-supervision",
                "--loss",
                "ce+dice",
                "--class-weights",
                "auto",
                "--color-jitter",
                "0.4",
            ),
            ("--tile", "32", "--resize", "36", "44", "--amp", "--channels-last"),
            (
                "--model",
                "test_vit",
                "--crop",
                "32",
                "--tile",
                "32",
                "--channels",
                "8",
                "8",
                "8",
                "8",
            ),
        ],
        ids=["decoder", "tiles", "vit"],
    )
    def test_settings(self, scenes, here, extra):
        self.check_run(
            here(*own(scenes), *extra),
            (
                f"U-Net, {'test_vit' if 'test_vit' in extra else 'test_resnet'}",
                "colour alone",
                "colour and height",
            ),
        )

    def test_rednet(self, scenes, here, tmp_path):
        self.check_run(
            here(
                *own(scenes),
                "--head",
                "rednet",
                "--taps",
                "3",
                "5",
                "--channels",
                "8",
                "8",
                "8",
                "8",
            ),
            ("RED-Net, test_resnet", "colour alone", "colour and height"),
        )
        model = load_model(tmp_path / "output/segment/model.safetensors")
        assert model.head_specs[0].kind == "rednet"
        assert [info.tap.stage for info in model.taps] == [3, 5]

    @pytest.mark.parametrize("head", ["linear", "lean", "fpn", "segformer", "upernet", "dpt"])
    def test_other_decoders(self, head, recipe, scenes, here, tmp_path):
        arguments = list(own(scenes))
        start = arguments.index("--channels")
        end = next(i for i in range(start + 1, len(arguments)) if not arguments[i].isdigit())
        arguments[start:end] = [] if head == "linear" else ["--channels", "8"]
        out = here(*arguments, "--head", head)
        title = f"{recipe.TITLES[head]}, test_resnet"
        self.check_run(out, (title, "colour alone", "colour and height"))
        model = load_model(tmp_path / "output/segment/model.safetensors")
        assert model.head_specs[0].kind == head
        assert [info.tap.stage for info in model.taps] == [2, 3, 4, 5]

    def test_a_new_run_leaves_the_older_one(self, scenes, here, tmp_path):
        self.check_run(here(*own(scenes)))
        before = (tmp_path / "output/segment/results.json").read_bytes()
        self.check_run(here(*own(scenes), "--seed", "1"))
        assert (tmp_path / "output/segment/results.json").read_bytes() == before
        assert json.loads((tmp_path / "output/segment-1/results.json").read_text())["seed"] == 1

    def test_weights_by_frequency(self, recipe):
        """Median frequency balancing by hand; the third class occurs nowhere."""
        from timm_branches.data import SegmentationDataset

        masks = np.array([[[0, 0, 0, 1]], [[0, 0, 0, -1]]])
        data = SegmentationDataset(np.zeros((2, 1, 4, 3), np.uint8), masks, 3)
        args = recipe.parse_args(["x", "--class-weights", "auto"])
        # of 7 labelled pixels, and of the 4 in the only image that has the second class
        frequency = [6 / 7, 1 / 4]
        median = min(frequency)  # torch's: the lower one of two
        weights = recipe.class_weights(args, data, 3, None)["mask"]
        assert weights.tolist() == pytest.approx([median / frequency[0], median / frequency[1], 0])
        tree = Taxonomy(["thing/a", "thing/b", "stuff/c"], levels=["coarse", "fine"])
        weights = recipe.class_weights(args, data, 3, tree)
        assert weights["coarse"].tolist() == [1, 0]
        assert torch.equal(weights["fine"], weights["mask"])


class TestSmp:
    def test_is_the_same_network_on_the_same_batches(self, scenes, here):
        """Encoder weights are shared, so a run that hardly learns has two equal encoders and as
        many parameters."""
        pytest.importorskip("segmentation_models_pytorch")
        args = own(scenes)
        status, out, err = here(
            *args, "--smp", "--model", "resnet18", "--channels", "32", "16", "8", "8", "8"
        )
        assert status == 0, err
        assert read_table(out)[0] == [
            "U-Net, resnet18",
            "smp Unet",
            "colour alone",
            "colour and height",
        ]
        ours, theirs = re.findall(r"([\d.]+) M parameters", out)
        assert ours == theirs
        assert "the last epoch" in out

    def test_trained_alike_from_the_same_weights(self, scenes, recipe, tmp_path):
        """From equal weights throughout, ``fit`` and the recipe's own loop make the same network
        of it."""
        pytest.importorskip("segmentation_models_pytorch")
        from timm_branches.train import FitConfig, fit

        args = recipe.parse_args(
            [
                *map(str, own(scenes)),
                "--model",
                "resnet18",
                "--channels",
                "8",
                "8",
                "8",
                "8",
                "8",
                "--epochs",
                "2",
                "--device",
                "cpu",
                "--no-progress",
                "--output",
                str(tmp_path / "run"),
            ]
        )
        train, *_ = recipe.read_data(args)
        torch.manual_seed(0)
        model = recipe.make_model(args, 4, None)
        unet = recipe.make_smp(args, model.backbone.state_dict(), 4)
        decoder = dict(model.head("mask").named_parameters())
        theirs = [*unet.decoder.parameters(), *unet.segmentation_head.parameters()]
        assert [p.shape for p in decoder.values()] == [p.shape for p in theirs]
        with torch.no_grad():
            for p, q in zip(theirs, decoder.values(), strict=True):
                p.copy_(q)
        config = FitConfig.from_args(args)
        train.transform = recipe.PairTransform(32)
        loader = recipe.partial(recipe.create_loader, train, 2, is_training=True)
        task = recipe.SegmentTask(model, "ce", recipe.partial(recipe.SegmentationEvaluator, 4))
        image = torch.randn(1, 3, 40, 48)
        small = image[..., :32, :32]
        with torch.no_grad():
            before = model.eval()(small)["mask"]
        fit(task, loader(), None, config)
        recipe.train_smp(unet, config, loader(), task.losses["mask"])
        with torch.no_grad():
            ours = model.eval()(small)["mask"]
            assert (ours - before).abs().max() > 0.05  # it has been trained
            torch.testing.assert_close(recipe.smp_answer(unet, small), ours, rtol=1e-3, atol=1e-4)
            assert recipe.smp_answer(unet, image).shape == (1, 4, 40, 48)

    @pytest.mark.parametrize(
        "extra",
        [
            ("--model-ema",),
            ("--clip-grad", "1"),
            ("--attention",),
            ("--head", "rednet"),
            ("--head", "lean"),
            ("--grad-accum-steps", "2"),
        ],
        ids=lambda extra: extra[0][2:],
    )
    def test_what_it_cannot_do_alike_is_refused(self, recipe, capsys, extra):
        with pytest.raises(SystemExit) as stopped:
            recipe.parse_args(["--smp", *extra])
        assert stopped.value.code == 2
        assert extra[0] in capsys.readouterr().err

    def test_not_installed(self, here, scenes, monkeypatch):
        monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
        status, out, err = here(*own(scenes), "--smp")
        assert (status, read_table(out)) == (2, ([], {}))
        assert "pip install segmentation-models-pytorch" in err


class TestMistakes:
    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["nowhere", "--classes", "4"], "no folder nowhere"),
            (["{two}"], "--classes is missing"),
            (["{two}", "--classes", "no.txt"], "no.txt"),
            (["{two}", "--classes", "3", "--ignore-index", "255"], "3 classes"),
            (["{two}", "--classes", "4"], "255"),
            (
                ["{two}", "--classes", "3", "--ignore-index", "255", "--taxonomy", "{tree}"],
                "has 4 classes",
            ),
            (["{odd}", "--classes", "4", "--ignore-index", "255"], "9"),
            (
                ["{two}", "--classes", "4", "--ignore-index", "255", "--class-weights", "1", "2"],
                "2 numbers for 4 classes",
            ),
            (
                ["{two}", "--classes", "4", "--ignore-index", "255", "--class-weights", "few"],
                "--class-weights few",
            ),
            (["--model", "resnet5000"], "resnet5000"),
            (["--taps", "7"], "7"),
            (["--channels", "8", "8"], "channels"),
            (["--scale", "2", "1"], "scale"),
            (["--lr", "0"], "--lr"),
            (["-b", "0"], "batch_size"),
            (["--repeats", "0"], "repeats"),
            (["--color-jitter", "-1"], "color_jitter"),
            (["--tile", "1"], "tile"),
        ],
        ids=lambda value: None if isinstance(value, str) else " ".join(value)[:40],
    )
    def test_one_line(self, scenes, here, args, message):
        places = {name: scenes / name for name in ("two", "odd")} | {"tree": scenes / "tree.csv"}
        small = ("--model", "test_resnet", "--crop", "32", "-b", "2", "--epochs", "1", "--no-plots")
        status, out, err = here(*small, *(arg.format(**places) for arg in args))
        assert status == 2, out
        assert err.startswith("segment.py: ")
        assert err.count("\n") == 1, err
        assert message in err
        assert read_table(out) == ([], {})

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--images", "photos"], "together"),
            (["--classes", "3"], "--classes has no effect"),
            (
                ["photos", "--head", "linear", "--channels", "8"],
                "--channels has no effect on --head",
            ),
            (
                ["photos", "--head", "dpt", "--input-skip"],
                "--input-skip has no effect on --head dpt",
            ),
            (["photos", "--head", "fpn", "--channels", "8", "4"], "takes one width for --head fpn"),
            (["photos", "--val-fraction", "0.5"], "--val-fraction has no effect"),
            (["--loss", "dice", "--class-weights", "auto"], "no effect with --loss dice"),
            (["--crop", "1", "2", "3"], "--crop"),
        ],
    )
    def test_flags_that_do_not_go_together(self, recipe, capsys, args, message):
        with pytest.raises(SystemExit) as stopped:
            recipe.parse_args(args)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes(scenes, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run_recipe(RECIPE, *own(scenes), cwd=tmp_path, launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mIoU") == 1
    assert read_table(done.stdout)[1]["IoU sky"][1] == 100


@pytest.mark.slow
def test_a_network_sees_more_than_single_pixels(tmp_path):
    """The job without arguments as it stands."""
    done = run_recipe(RECIPE, "--no-plots", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    levels, flat, colour, _ = read_table(done.stdout)[1]["object mIoU"]
    assert min(levels, flat) > colour + 10


def test_masks_of_colours(tmp_path):
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for i in range(3):
            labels = rng.integers(0, 2, (32, 32))
            colours = np.array([[0, 0, 0], [128, 64, 128]], np.uint8)[labels]
            for folder, pixels, suffix in ((part, colours, ""), (f"{part}annot", colours, "_gt")):
                (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(tmp_path / "data" / folder / f"{i}{suffix}.png")
    (tmp_path / "colours.txt").write_text("0 0 0 ground\n128 64 128 road\n")
    (tmp_path / "names.txt").write_text("ground\nroad\n")
    arguments = [tmp_path / "data", "--classes", "names.txt", "--mask-colors", "colours.txt"]
    arguments += ["--model", "test_resnet", "--taps", "3", "5", "--crop", "32", "--epochs", "1"]
    arguments += ["-b", "2", "--mask-suffix", "_gt", "--output", "out"]
    done = run_recipe(RECIPES / "segment.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # the masks are the images: colour alone tells every pixel
    _, rows = read_table(done.stdout)
    assert all(row[1] == 100 for row in rows.values() if row[1] is not None)
    assert rows
