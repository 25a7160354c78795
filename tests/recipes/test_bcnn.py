"""``recipes/bcnn.py`` as a user runs it: a script, started from some other folder."""

import csv
import importlib.util
import json
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.recipes.script import RECIPES, read_table, run_recipe
from timm_branches import load_model
from timm_branches.data import create_loader, create_splits
from timm_branches.inference.calibrated import CalibratedEvaluator, model_calibration
from timm_branches.inference.predict import model_transform
from timm_branches.schedules import get_schedule
from timm_branches.task import BranchTask
from timm_branches.taxonomy import digits
from timm_branches.train import evaluate

RECIPE = RECIPES / "bcnn.py"
LEAVES = ("animal/cat", "animal/dog", "vehicle/bus", "vehicle/car")
TINY = (
    "--model",
    "test_resnet",
    "--taps",
    "3",
    "5",
    "--img-size",
    "32",
    "--epochs",
    "1",
    "-b",
    "8",
    "--no-plots",
)


def start(*args, cwd, launcher=()):
    """Run the script in a process of its own; it must succeed."""
    done = run_recipe(RECIPE, *args, cwd=cwd, launcher=launcher)
    assert done.returncode == 0, done.stderr
    return done


def epochs_logged(folder):
    with open(folder / "log.csv", newline="") as stream:
        return [int(row["epoch"]) for row in csv.DictReader(stream)]


def write_images(root, folders, count=8, size=32):
    """Class folders of noise, each class with a colour of its own."""
    rng = np.random.default_rng(0)
    paths = []
    for k, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 60, (size, size, 3)) + np.array([60 * k, 180 - 60 * k, 20 * k])
            paths.append(Path(folder) / f"{i}.png")
            Image.fromarray(pixels.astype(np.uint8)).save(root / paths[-1])
    return paths


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """The same pictures nested and flat, as a tar, and as a CSV.

    In the CSV the fine label of some is unknown.
    """
    root = tmp_path_factory.mktemp("photos")
    paths = write_images(root / "nested", LEAVES)
    write_images(root / "flat", [leaf.split("/")[1] for leaf in LEAVES])
    (root / "tree.csv").write_text(
        "kind,thing\n" + "".join(leaf.replace("/", ",") + "\n" for leaf in LEAVES)
    )
    with tarfile.open(root / "photos.tar", "w") as tar:
        tar.add(root / "nested", arcname="photos")
    (root / "broken.png").write_bytes(b"no image")
    (root / "broken.csv").write_text(
        "path,kind,thing\n" + "broken.png,animal,cat\nbroken.png,vehicle,car\n" * 5
    )
    with open(root / "photos.csv", "w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["path", "kind", "thing"])
        for i, path in enumerate(paths):
            kind, thing, _ = path.parts
            rows.writerow([f"nested/{path}", kind, "" if i % 5 == 0 else thing])
    return root


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """The job without arguments, cut short."""
    folder = tmp_path_factory.mktemp("digits")
    return folder, start("--epochs", "1", "--limit", "200", cwd=folder)


class TestWithoutArguments:
    def test_table(self, digits_run):
        rows = read_table(digits_run[1].stdout)[1]
        assert list(rows) == ["B-CNN", "B-CNN, best path", "flat"]
        *others, kept = rows.pop("B-CNN")
        assert kept is None  # it has no distribution to climb by
        assert len(others) == 7
        for numbers in rows.values():
            assert len(numbers) == 8
            assert all(0 <= x <= 100 for x in numbers)
        rows = read_table(digits_run[1].stdout)[1]
        consistency = [numbers[3] for numbers in rows.values()]
        assert consistency[0] < consistency[1] == consistency[2] == 100
        assert "360 test images" in digits_run[1].stdout

    def test_what_it_is_sure_of(self, digits_run):
        """What is printed of calibrated answers is what evaluate says of the files."""
        said = re.findall(
            r"^(B-CNN, best path|flat), asked to be right on 95 %: sure of the digit on ([\d.]+) %,"
            r" of the shape on ([\d.]+) % of the images; ([\d.]+) % of these",
            digits_run[1].stdout,
            re.MULTILINE,
        )
        assert [name for name, *_ in said] == ["B-CNN, best path", "flat"]
        tree = digits()
        for (_, *shares), folder in zip(said, ("bcnn", "flat"), strict=True):
            path = digits_run[0] / "output" / "bcnn" / folder / "model.safetensors"
            model = load_model(path)
            calibration = model_calibration(model, tree)
            assert calibration.targets == {"": 0.95}
            assert calibration.data == "validation"
            digit, shape, right = map(float, shares)
            assert 0 <= digit <= shape <= 100
            # 20 validation images say little of 360 others
            assert right > 80

    def test_files(self, digits_run):
        output = digits_run[0] / "output" / "bcnn"
        for name in ("bcnn", "flat"):
            assert {
                "model.safetensors",
                "last.safetensors",
                "log.csv",
                "history.png",
                "confusion_shape.png",
                "confusion_digit.png",
            } <= {path.name for path in (output / name).iterdir()}
        facts = json.loads((output / "results.json").read_text())
        rows = read_table(digits_run[1].stdout)[1]
        columns = (
            "shape_top1",
            "digit_top1",
            "full_path",
            "consistency",
            "hf",
            "distance",
            "severity",
            "information@95",
        )
        assert list(facts["results"]) == list(rows)
        for name, (metrics,) in facts["results"].items():
            assert [metrics.get(key) for key in columns] == pytest.approx(rows[name], abs=0.006)
        assert facts["train_images"] == 200
        assert facts["images"] == 360
        assert "--limit 200" in facts["command"]

    def test_saved_models_predict(self, digits_run):
        output = digits_run[0] / "output" / "bcnn"
        images = torch.rand(2, 1, 8, 8)
        branches = load_model(output / "bcnn" / "model.safetensors").eval()
        branches_out = branches(
            torch.nn.functional.interpolate(images, branches.pretrained_cfg["input_size"][1:])
        )
        assert {name: tuple(out.shape) for name, out in branches_out.items()} == {
            "shape": (2, 3),
            "digit": (2, 10),
        }
        flat = load_model(output / "flat" / "model.safetensors").eval()
        flat_out = flat(
            torch.nn.functional.interpolate(images, flat.pretrained_cfg["input_size"][1:])
        )
        assert {name: tuple(out.shape) for name, out in flat_out.items()} == {"leaf": (2, 10)}
        assert all(out.isfinite().all() for out in [*branches_out.values(), *flat_out.values()])


class TestRuns:
    def test_new_run_and_resume(self, tmp_path, here):
        tiny = (*TINY, "--limit", "64", "--no-flat")
        first, again = (
            tmp_path / "output" / "bcnn" / "bcnn",
            tmp_path / "output" / "bcnn-1" / "bcnn",
        )
        assert here(*tiny)[0] == 0
        before = {path.name: path.read_bytes() for path in first.iterdir()}
        assert here(*tiny)[0] == 0
        assert {path.name: path.read_bytes() for path in first.iterdir()} == before
        assert epochs_logged(again) == [0]
        status, out, _ = here(
            *tiny, "--epochs", "2", "--resume", "auto", "--output", "output/bcnn-1"
        )
        assert status == 0
        assert epochs_logged(again) == [0, 1]
        assert "epoch 2/2" in out
        assert "epoch 1/2" not in out
        assert {path.name: path.read_bytes() for path in first.iterdir()} == before

    def test_resume_without_an_earlier_run_starts(self, tmp_path, here):
        assert here(*TINY, "--limit", "64", "--resume", "auto", "--output", "new")[0] == 0
        assert epochs_logged(tmp_path / "new" / "bcnn") == [0]
        assert epochs_logged(tmp_path / "new" / "flat") == [0]


class TestOwnData:
    def check_run(self, result, folder, levels=("level1", "level2")):
        status, out, err = result
        assert status == 0, err
        assert list(read_table(out)[1]) == ["B-CNN", "B-CNN, best path", "flat"]
        model = load_model(folder / "output" / "bcnn" / "bcnn" / "model.safetensors")
        assert model.taxonomy.levels == levels
        assert model.taxonomy.leaves == tuple(tuple(leaf.split("/")) for leaf in LEAVES)

    def test_nested_folders_with_everything_on(self, photos, tmp_path, here):
        import albumentations

        file = tmp_path / "augment.json"
        albumentations.save(
            albumentations.Compose(
                [albumentations.Resize(32, 32), albumentations.HorizontalFlip()]
            ),
            file,
        )
        everything = ("--detach", "--mixup", "0.2", "--smoothing", "0.1", "--augment", file)
        self.check_run(here(photos / "nested", *TINY, *everything), tmp_path)

    def test_flat_folders_and_taxonomy(self, photos, tmp_path, here):
        self.check_run(
            here(photos / "flat", "--taxonomy", photos / "tree.csv", *TINY),
            tmp_path,
            ("kind", "thing"),
        )

    def test_csv_with_unknown_labels(self, photos, tmp_path, here):
        self.check_run(here(photos / "photos.csv", *TINY), tmp_path, ("kind", "thing"))

    def test_tar(self, photos, tmp_path, here):
        self.check_run(here(photos / "photos.tar", *TINY), tmp_path)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "extra",
        [
            ("--cutmix", "1"),
            ("--head", "flatten", "--hidden", "16", "32"),
            ("--model-ema", "--model-ema-decay", "0.9"),
            ("--opt", "adamw", "--layer-decay", "0.8"),
            ("--channels-last", "--amp", "--grad-accum-steps", "2"),
            ("--schedule", "0:1,0;1:0,1", "--epochs", "2"),
            ("--in-chans", "1"),
            ("--workers", "2"),
            ("--model", "test_vit", "--taps", "3", "5"),
            ("--freeze-backbone", "--clip-grad", "1"),
        ],
        ids=lambda extra: extra[0][2:],
    )
    def test_settings(self, photos, tmp_path, extra):
        done = start(photos / "nested", *TINY, *extra, cwd=tmp_path)
        self.check_run((0, done.stdout, done.stderr), tmp_path)


class TestStudies:
    METHODS = (
        "B-CNN",
        "B-CNN, no level off",
        "constant weights",
        "detached branches",
        "independent branches",
    )

    @pytest.fixture(scope="class")
    def compared(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("compare")
        args = (
            *TINY,
            "--compare",
            "--seeds",
            "2",
            "--epochs",
            "4",
            "--limit",
            "96",
            "--plots",
            "--output",
            "out",
        )
        return folder / "out", start(*args, cwd=folder).stdout

    def test_every_method_is_evaluated_over_the_seeds(self, compared):
        folder, out = compared
        rows = read_table(out)[1]
        decoded = [title for name in self.METHODS for title in (name, f"{name}, best path")]
        assert set(rows) == {"flat, leaf-marginal", "flat, CRM", *decoded}
        results = json.loads((folder / "results.json").read_text())["results"]
        for name, runs in results.items():
            assert len(runs) == 2
            assert np.mean([run["full_path"] for run in runs]) == pytest.approx(
                rows[name][2], abs=0.006
            )
            # all but the heads that answer for themselves promise a path of the tree
            if name not in self.METHODS:
                assert rows[name][3] == 100, name
        verdict = (
            r"^(No measurable gain|A measurable \w+)\. B-CNN, best path against flat, leaf-marginal"
        )
        assert re.search(verdict, out, re.MULTILINE)
        assert "Seeds 0 to 1" in out

    def test_budget_is_equal(self, compared):
        for seed in ("seed0", "seed1"):
            for name in (
                "flat",
                "b_cnn",
                "b_cnn_no_level_off",
                "constant_weights",
                "detached_branches",
            ):
                assert epochs_logged(compared[0] / seed / name) == [0, 1, 2, 3]
            assert (
                sum(
                    len(epochs_logged(compared[0] / seed / f"alone_{level}"))
                    for level in ("shape", "digit")
                )
                == 4
            )

    def test_schedules_and_detached_branches_are_what_they_say(self, compared):
        def column(name, key):
            with open(compared[0] / "seed0" / name / "log.csv", newline="") as stream:
                return [float(row[key]) for row in csv.DictReader(stream)]

        assert column("b_cnn", "weight_shape")[-1] == 0
        assert min(column("b_cnn_no_level_off", "weight_shape")) > 0
        assert set(column("constant_weights", "weight_shape")) == {0.5}
        detached = load_model(compared[0] / "seed0" / "detached_branches" / "model.safetensors")
        assert [info.tap.detach for info in detached.taps] == [True, False]
        assert (compared[0] / "collapse.png").read_bytes().startswith(b"\x89PNG")
        assert "becomes 0" in compared[1]

    def test_methods(self, tmp_path, here):
        """Losses of recent papers, by name; the flat network is always among them."""
        chosen = ["hxe", "soft", "ancestors", "sharing", "margin"]
        flags = ["--compare", "--seeds", "2", "--limit", "96", "--output", "out"]
        status, out, err = here(*TINY, *flags, "--methods", *chosen)
        assert status == 0, err
        names = ["flat, CRM", "flat, leaf-marginal"]
        for name in ("flat, HXE", "flat, soft labels", "flat, ancestors"):
            names.append(name)
        names += ["parameter sharing", "soft margin"]
        rows = read_table(out)[1]
        assert list(rows) == names
        assert all(numbers[3] == 100 for numbers in rows.values()), "paths of the tree"
        for name in names[2:]:
            assert re.search(rf"\. {name} against flat, leaf-marginal, full-path", out)
        model = load_model(tmp_path / "out" / "seed0" / "soft_margin" / "model.safetensors")
        assert model.calibration["decoder"] == "path-sum"
        status, _, err = here(*TINY, "--methods", "margin")
        assert status == 2
        assert "--methods has no effect without --compare" in err

    def test_partial_labels(self, tmp_path, here):
        status, out, err = here(
            *TINY, "--partial", "0.5", "--epochs", "2", "--limit", "96", "--output", "out"
        )
        assert status == 0, err
        names = [
            f"{net}, 50% coarse, {what}"
            for what in ("learned from", "dropped", "dropped, as many images")
            for net in ("B-CNN", "flat")
        ]
        assert list(read_table(out)[1]) == names
        folder = tmp_path / "out" / "seed0"
        assert epochs_logged(folder / "b_cnn_50_coarse_learned_from") == [0, 1]
        assert epochs_logged(folder / "b_cnn_50_coarse_dropped") == [0, 1]
        assert epochs_logged(folder / "b_cnn_50_coarse_dropped_as_many_images") == [0, 1, 2, 3]
        assert out.count("No verdict from a single seed") == 4

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--seeds", "2"], "--seeds has no effect"),
            (["--compare", "--seeds", "0"], "--seeds must be above 0"),
            (["--compare", "--partial", "0.5"], "choose one"),
            (["--compare", "--no-flat"], "--no-flat has no effect"),
        ],
    )
    def test_flags_that_do_not_go_together(self, recipe, capsys, args, message):
        with pytest.raises(SystemExit) as stopped:
            recipe.parse_args(args)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err

    def test_paper_schedule_is_the_papers_on_its_own_epochs(self, recipe):
        schedule = get_schedule(recipe.paper_schedule(3, 60))
        assert list(schedule.points) == [0, 9, 19, 29]
        assert schedule(0) == pytest.approx((0.98, 0.01, 0.01))
        assert schedule(9) == pytest.approx((0.1, 0.8, 0.1))
        assert schedule(29) == (0, 0, 1)
        assert recipe.without_zeros(schedule)(59) == (0.05, 0.05, 1)
        for levels in (2, 4):
            assert get_schedule(recipe.paper_schedule(levels, 15)).num_levels == levels

    def test_rates_are_stretched_with_the_epochs(self, recipe):
        assert recipe.stretched("0:3e-3;41:5e-4;51:1e-4", 2) == "0:3e-3;82:5e-4;102:1e-4"
        assert recipe.stretched("", 2) == ""


class TestPublishedSettings:
    def parse(self, recipe, *args):
        from timm_branches.train import FitConfig

        parsed = recipe.parse_args(list(args))
        return parsed, FitConfig.from_args(parsed)

    def test_bcnn_b_cifar10(self, recipe):
        from timm_branches.train import PiecewiseLR

        args, config = self.parse(recipe, "--recipe", "bcnn-b-cifar10")
        assert (args.data, args.taxonomy, args.model, args.taps) == (
            "cifar10",
            "cifar10",
            "bcnn_b",
            ["3", "4", "5"],
        )
        assert (args.hidden, args.head, args.augment) == ([256, 512, 1024], "flatten", "none")
        assert (args.batch_size, args.mixup, args.cutmix, args.smoothing) == (128, 0, 0, 0)
        assert (config.opt, config.momentum, config.weight_decay, config.epochs) == (
            "sgd",
            0.9,
            0,
            60,
        )
        assert (config.warmup_epochs, config.clip_grad, config.model_ema, config.amp) == (
            0,
            None,
            False,
            False,
        )
        # the code counts epochs from 0 and drops the rate when epoch > 40 and > 50
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
        scheduler, rates = PiecewiseLR(optimizer, config.lr_at()), []
        for epoch in range(config.epochs):
            scheduler.step(epoch)
            rates.append(optimizer.param_groups[0]["lr"])
        assert rates == pytest.approx(
            [1e-4 if epoch > 50 else 5e-4 if epoch > 40 else 3e-3 for epoch in range(60)]
        )
        weights = get_schedule(args.schedule, num_levels=3)
        want = (
            [(0.98, 0.01, 0.01)] * 9
            + [(0.1, 0.8, 0.1)] * 10
            + [(0.1, 0.2, 0.7)] * 10
            + [(0, 0, 1)] * 31
        )
        assert weights.table(60) == want

    def test_bcnn_vgg16_cifar100(self, recipe):
        args, config = self.parse(recipe, "--recipe", "bcnn-vgg16-cifar100")
        assert (args.data, args.taxonomy, args.model, args.pretrained) == (
            "cifar100",
            "cifar100",
            "bcnn_vgg16",
            True,
        )
        assert (args.batch_size, config.opt, config.weight_decay) == (128, "sgd", 0)
        weights = get_schedule(args.schedule, num_levels=3)
        switches = [
            epoch for epoch in range(1, config.epochs) if weights(epoch) != weights(epoch - 1)
        ]
        assert switches == [14, 24, 34]

    @pytest.mark.parametrize(
        "name",
        [
            "bcnn-b-cifar10",
            "bcnn-vgg16-cifar100",
            "hcnn-fashion-mnist",
            "bcnn-a-mnist",
            "modern-cifar10",
        ],
    )
    def test_is_valid_and_can_be_overridden(self, recipe, name):
        from timm_branches.taxonomy import get_taxonomy

        args, config = self.parse(recipe, "--recipe", name)
        assert all(getattr(args, key) == value for key, value in recipe.RECIPES[name].items())
        levels = get_taxonomy(args.taxonomy).num_levels
        assert len(args.taps) == levels
        assert get_schedule(args.schedule, num_levels=levels)(config.epochs).count(0) < levels
        other = {
            "lr": "0.5",
            "epochs": "3",
            "batch_size": "7",
            "opt": "adamw",
            "weight_decay": "0.25",
            "momentum": "0.5",
            "sched": "cosine",
            "lr_steps": "",
            "warmup_epochs": "4",
            "schedule": "equal",
            "augment": "light",
            "head": "pool" if args.head == "flatten" else "flatten",
            "model": "resnet18",
            "taxonomy": "tree.csv",
            "mixup": "0.75",
            "smoothing": "0.3",
            "model_ema_decay": "0.5",
            "in_chans": "4",
            "img_size": "48",
        }
        lists = {"taps": ["1", "2"], "hidden": [8, 9], "mean": [0.25], "std": [0.125]}
        flags = [
            word for key, value in other.items() for word in (f"--{key.replace('_', '-')}", value)
        ]
        flags += [word for key, value in lists.items() for word in (f"--{key}", *map(str, value))]
        switches = ["pretrained", "amp", "channels_last", "model_ema", "model_ema_warmup"]
        flags += [
            f"--{'no-' if getattr(args, key) else ''}{key.replace('_', '-')}" for key in switches
        ]
        asked = recipe.parse_args(["photos", "--recipe", name, *flags])
        assert asked.data == "photos"
        assert {key: getattr(asked, key) for key in lists} == lists
        for key, value in other.items():
            assert getattr(asked, key) == type(getattr(asked, key))(value), key
        assert all(getattr(asked, key) is not getattr(args, key) for key in switches)
        # nothing of it was forgotten above
        assert set(recipe.RECIPES[name]) <= {*other, *lists, *switches, "data"}


MISTAKES = {
    "unknown model": (["--model", "resnet5000"], "resnet5000"),
    "number of taps": (["--taps", "3", "4", "5"], "--taps 3 4 5"),
    "one level": (["{photos}/flat"], "--taxonomy"),
    "no folder": (["nowhere/photos"], "nowhere/photos"),
    "schedule text": (["--schedule", "0:1,0;5"], "'5'"),
    "schedule name": (["--schedule", "bcnn"], "bcnn-cifar10"),
    "schedule levels": (["--schedule", "bcnn-cifar10"], "3 levels"),
    "lr 0": (["--lr", "0"], "--lr"),
    "unknown tap": (["--taps", "3", "conv9"], "5 layer4 96 32"),
    "no such module": (["--taps", "3", "layer9.0"], "layer9.0"),
    "hidden": (["--hidden", "32"], "--hidden"),
    "resume": (["--resume", "last.safetensors"], "--resume auto"),
    "augment": (["--augment", "strong"], "strong"),
    "metric": (["--eval-metric", "kindness"], "kindness"),
    "optimizer": (["--opt", "sgdd"], "sgdd"),
    "scheduler": (["--sched", "cosinus"], "cosinus"),
    "taxonomy": (["{photos}/flat", "--taxonomy", "nowhere.csv"], "nowhere.csv"),
    "limit": (["--limit", "0"], "--limit"),
    "val fraction": (["{photos}/nested", "--val-fraction", "2"], "fraction"),
    "batch": (["-b", "0"], "batch_size"),
    "output": (["--output", "{photos}/tree.csv"], "tree.csv"),
    "broken image": (["{photos}/broken.csv", "-b", "2", "--img-size", "32"], "broken.png"),
    "mean": (["--mean", "0.5", "0.5"], "mean"),
    "partial": (["--partial", "1.5"], "fraction=1.5"),
    "mixup": (["--mixup", "-1"], "mixup"),
    "smoothing": (["--smoothing", "2"], "smoothing"),
}


class TestMistakes:
    def check_line(self, status, out, err, needle):
        assert status == 2, err
        assert err.startswith("bcnn.py: ")
        assert err.count("\n") == 1, err
        assert needle in err
        assert read_table(out)[1] == {}

    @pytest.mark.parametrize("name", MISTAKES)
    def test_one_line(self, name, photos, here):
        args, needle = MISTAKES[name]
        args = [arg.format(photos=photos) for arg in args]
        own = ["--model", "test_resnet", "--limit", "64", "--epochs", "1"]
        self.check_line(
            *here(*own, *args) if args[0].startswith("-") else here(args[0], *own, *args[1:]),
            needle,
        )

    def test_in_a_process(self, tmp_path):
        done = run_recipe(RECIPE, "nowhere", cwd=tmp_path)
        self.check_line(done.returncode, done.stdout, done.stderr, "nowhere")

    def test_unknown_flag_prints_usage(self, here):
        status, _, err = here("--learning-rate", "1")
        assert status == 2
        assert "--learning-rate" in err
        assert "Traceback" not in err

    def test_an_earlier_run_of_another_model(self, tmp_path, here):
        tiny = (*TINY, "--limit", "64", "--no-flat", "--output", "mine")
        assert here(*tiny)[0] == 0
        status, out, err = here(*tiny, "--model", "test_vit", "--resume", "auto", "--epochs", "2")
        self.check_line(status, out, err, "another model")
        assert epochs_logged(tmp_path / "mine" / "bcnn") == [0]


@pytest.mark.slow
def test_two_processes(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = start(
        "--epochs",
        "1",
        "--limit",
        "128",
        "-b",
        "32",
        "--device",
        "cpu",
        cwd=tmp_path,
        launcher=launcher,
    )
    assert list(read_table(done.stdout)[1]) == ["B-CNN", "B-CNN, best path", "flat"]
    assert done.stdout.count("full path") == 1
    output = tmp_path / "output" / "bcnn"
    assert epochs_logged(output / "bcnn") == [0]
    # each process calibrates and judges on all images, not on its part
    model = load_model(output / "bcnn" / "model.safetensors")
    calibration = model_calibration(model, digits())
    _, val, test = create_splits("digits", 0.1, seed=0, in_chans=1)
    assert calibration.count == len(val)
    test.transform = model_transform(model)
    task = BranchTask(model)
    answers = CalibratedEvaluator(calibration, digits(), task.level_logits)
    evaluate(task, create_loader(test, 32), also=[answers])
    [said] = json.loads((output / "results.json").read_text())["results"]["B-CNN, best path"]
    for name, value in answers.compute().items():
        assert said[name] == pytest.approx(value, abs=0.5), name


@pytest.mark.slow
def test_learns_the_digits(tmp_path):
    """A few epochs are enough to see that both networks are trained at all."""
    rows = read_table(start("--epochs", "4", "--no-plots", cwd=tmp_path).stdout)[1]
    assert min(numbers[1] for numbers in rows.values()) > 70


@pytest.mark.parametrize(
    "args",
    [
        ["--recipe", "bcnn-b-cifar10", "--lr", "0.1"],
        ["--recipe", "bcnn-b-cifar10", "--hflip", "0.5"],
    ],
)
def test_a_flag_without_effect_is_refused(recipe, capsys, args):
    with pytest.raises(SystemExit) as stopped:
        recipe.parse_args(args)
    assert stopped.value.code == 2
    assert f"{args[2]} has no effect" in capsys.readouterr().err


def test_default_taps():
    """B-CNN's depths from scratch; the last stage where a backbone brings weights."""
    recipe = load_recipe()
    for flags, wanted in (
        ([], ["4", "5"]),
        (["--checkpoint-path", "weights.safetensors"], ["5", "5"]),
        (["--pretrained"], ["5", "5"]),
        (["--pretrained", "--taps", "3", "5"], ["3", "5"]),
    ):
        assert recipe.taps_of(recipe.parse_args(flags), digits()) == wanted


def load_recipe():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("bcnn_recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class TestFrozenBackbone:
    """Features are computed once, and change nothing."""

    def test_as_without_the_cache(self, tmp_path, capsys):
        recipe = load_recipe()
        results = []
        for cached in (True, False):
            output = tmp_path / f"run{cached}"
            args = recipe.parse_args(
                ["--model", "test_resnet", "--freeze-backbone", "--epochs", "2", "--limit", "100"]
                + ["--img-size", "32", "--no-plots", "--output", str(output)]
            )
            made = recipe.Experiment(args)
            assert made.reads_features
            made.reads_features = cached
            table, _ = recipe.with_and_without(made)
            models = [load_model(output / name / "model.safetensors") for name in ("bcnn", "flat")]
            results.append((table, models))
            assert (output / "features").exists() == cached
        assert "computed once" in capsys.readouterr().out
        (table, models), (other_table, other_models) = results
        for name, [metrics] in table.items():
            [other] = other_table[name]
            for key in ("shape_top1", "full_path", "loss"):
                assert metrics[key] == pytest.approx(other[key], rel=1e-4)
        for model, other in zip(models, other_models, strict=True):
            for key, value in other.state_dict().items():
                torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("flags", [["--augment", "light"], ["--mixup", "0.2"]])
    def test_augmented_images_are_not_cached(self, flags, tmp_path, capsys):
        recipe = load_recipe()
        args = recipe.parse_args(
            ["--model", "test_resnet", "--freeze-backbone", "--output", str(tmp_path / "run")]
            + [*flags, "--limit", "50"]
        )
        assert not recipe.Experiment(args).reads_features
        assert "computes them once" in capsys.readouterr().out
