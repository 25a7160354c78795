"""``recipes/denoise.py`` as a user runs it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from tests.recipes.script import RECIPES, read_table, run_recipe
from timm_branches import load_model

RECIPE = RECIPES / "denoise.py"
TINY = (
    "--epochs",
    "1",
    "--patches",
    "2",
    "-b",
    "2",
    "--patch-size",
    "16",
    "--channels",
    "4",
    "4",
    "4",
)


def smooth_images(folder, count, size=32):
    rng = np.random.default_rng(len(folder.name))
    folder.mkdir(parents=True)
    for i in range(count):
        image = gaussian_filter(rng.random((size, size + 8)), 3)
        image = 255 * (image - image.min()) / np.ptp(image)
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{i}.png")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for part, count in (("train", 6), ("test", 2), ("spare", 3)):
        smooth_images(root / "parts" / part, count)
    smooth_images(root / "plain", 5)
    smooth_images(root / "small" / "train", 4, size=8)
    smooth_images(root / "only" / "test", 2)
    (root / "note.txt").write_text("no folder")
    return root


class TestWithoutArguments:
    @pytest.fixture(scope="class")
    def done(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("default")
        done = run_recipe(RECIPE, *TINY, cwd=folder)
        assert done.returncode == 0, done.stderr
        return folder / "output" / "denoise", done.stdout

    def test_table_and_results(self, done):
        folder, out = done
        rows = read_table(out)[1]
        assert len(rows) == 6
        assert [
            sum(word in name for name in rows)
            for word in ("degraded", "network", "non-local means")
        ] == [2, 2, 1]
        noisy = rows["noise 25, degraded"]
        # PSNR of white noise in closed form
        assert noisy[0] == pytest.approx(20 * np.log10(255 / 25), abs=0.05)
        facts = json.loads((folder / "results.json").read_text())
        assert facts["images"] == 4
        for name, found in facts["results"].items():
            assert [found["psnr"], found["ssim"]] == pytest.approx(rows[name], abs=0.006)

    def test_classical_methods_help(self, done):
        rows = read_table(done[1])[1]
        best = {
            name.split(", ")[0]: numbers[0]
            for name, numbers in rows.items()
            if "degraded" not in name and "network" not in name
        }
        assert best["noise 25"] > rows["noise 25, degraded"][0] + 5
        assert best["blur 1.5"] > rows["blur 1.5, noise 2, degraded"][0] + 1

    def test_files(self, done):
        folder, _ = done
        assert (folder / "pictures.png").read_bytes().startswith(b"\x89PNG")
        for name in ("noise_25", "blur_1.5_noise_2"):
            model = load_model(folder / name / "model.safetensors").eval()
            assert model(torch.rand(1, 1, 33, 41))["image"].shape == (1, 1, 33, 41)


class TestOwnImages:
    @pytest.mark.parametrize(
        ("data", "args", "images", "levels"),
        [
            (
                "parts",
                ("--sigma", "0", "50", "--test-sigma", "10", "30"),
                "2 test",
                ["noise 10", "noise 30"],
            ),
            (
                "parts",
                ("--test", "spare", "--colour", "--head", "rednet", "--tile", "16", "--loss", "l2"),
                "3 test",
                ["noise 25"],
            ),
            ("plain", ("--blur", "1", "2", "--val-fraction", "0.4"), "2 validation", ["blur 1.5"]),
            (
                "plain",
                (
                    "--model",
                    "test_resnet",
                    "--taps",
                    "2",
                    "3",
                    "--no-input-skip",
                    "--val-fraction",
                    "0.4",
                    "--amp",
                    "--channels-last",
                ),
                "2 validation",
                ["noise 25"],
            ),
        ],
    )
    def test_runs(self, photos, here, data, args, images, levels):
        status, out, err = here(photos / data, *TINY, "--no-plots", *args)
        assert status == 0, err
        assert [name.split(", ")[0] for name in read_table(out)[1] if "network" in name] == levels
        assert f"{images} images" in out or f"{images} (there is no test folder) images" in out
        counts = {
            "parts": "train: 5 images\nval: 1 image\ntest: ",
            "plain": "train: 3 images\nval: 2 images",
        }
        assert counts[data] in out

    def test_compression(self, photos, here):
        status, out, err = here(photos / "parts", *TINY, "--no-plots", "--jpeg", "10", "40")
        assert status == 0, err
        names = list(read_table(out)[1])
        assert [name.split(", ")[0] for name in names if "network" in name] == ["JPEG 25"]
        assert any("total variation" in name for name in names) or "total variation" in out

    def test_training_and_validation_are_apart(self, photos, recipe):
        args = recipe.parse_args([str(photos / "plain"), "--val-fraction", "0.4", "--patches", "3"])
        experiment = recipe.Experiment.__new__(recipe.Experiment)
        experiment.args, experiment.images = args, recipe.folders(args)
        noise = recipe.Degradation((25, 25))
        parts = {
            part: experiment.dataset(
                part, noise, repeats=3 if part == "train" else 1, is_training=part == "train"
            )
            for part in ("train", "val")
        }
        seen = {
            part: {data[i][1].numpy().tobytes() for i in range(len(data))}
            for part, data in parts.items()
        }
        assert (len(seen["train"]), len(seen["val"])) == (3, 2)
        assert len(parts["train"]) == 9
        assert not seen["train"] & seen["val"]

    def test_the_same_seed_gives_the_same_noise_and_numbers(self, photos, here):
        first, again = (
            here(photos / "parts", *TINY, "--no-plots", "--output", f"run{i}")[1] for i in (1, 2)
        )
        assert read_table(first)[1] == read_table(again)[1] != {}

    def test_resume(self, photos, here, tmp_path):
        command = (photos / "parts", *TINY, "--no-plots", "--output", "mine")
        assert here(*command)[0] == 0
        status, out, err = here(*command, "--epochs", "2", "--resume", "auto")
        assert status == 0, err
        assert "epoch 2/2" in out
        assert "epoch 1/2" not in out
        assert here(*command)[0] == 0  # a new folder beside the old one
        assert (tmp_path / "mine-1" / "results.json").exists()


class TestOwnPairs:
    """Noisy images with an offset that no smoothing takes out, so that only training can help."""

    @pytest.fixture(scope="class")
    def pairs(self, tmp_path_factory):
        root = tmp_path_factory.mktemp("pairs")
        for split, count in (("train", 6), ("test", 2)):
            smooth_images(root / "inner" / "clean" / split, count)
            write_noisy(root / "inner" / "clean" / split, root / "inner" / "noisy" / split)
            smooth_images(root / "outer" / split / "gt", count)
            write_noisy(root / "outer" / split / "gt", root / "outer" / split / "in", "_noisy")
        smooth_images(root / "flat" / "clean", 5)
        write_noisy(root / "flat" / "clean", root / "flat" / "noisy")
        smooth_images(root / "half" / "clean" / "train", 2)
        (root / "half" / "noisy").mkdir()
        return root

    @pytest.mark.parametrize(
        ("args", "images"),
        [
            (("--noisy", "{root}/inner/noisy", "--clean", "{root}/inner/clean"), "2 test"),
            (("{root}/inner", "--noisy", "noisy", "--clean", "clean"), "2 test"),
            (
                ("{root}/outer", "--noisy", "in", "--clean", "gt", "--noisy-suffix", "_noisy"),
                "2 test",
            ),
            (
                ("{root}/outer/", "--noisy", "in", "--clean", "gt", "--test", "test")
                + ("--noisy-suffix", "_noisy", "--colour"),
                "2 test",
            ),
            (
                ("--noisy", "{root}/flat/noisy", "--clean", "{root}/flat/clean")
                + ("--val-fraction", "0.4"),
                "2 validation",
            ),
        ],
    )
    def test_runs(self, pairs, here, args, images):
        args = [arg.format(root=pairs) for arg in args]
        status, out, err = here(*args, *TINY, "--no-plots")
        assert status == 0, err
        assert f"{images} " in out
        rows = read_table(out)[1]
        # an offset of 40 of 255, in closed form
        assert rows["own pairs, degraded"][0] == pytest.approx(20 * np.log10(255 / 40), abs=0.05)
        assert any("total variation" in name for name in rows)
        assert "own pairs, network" in rows

    def test_the_model_keeps_the_range_of_values(self, pairs, here, tmp_path):
        folders = ("--noisy", pairs / "flat/noisy", "--clean", pairs / "flat/clean")
        status, out, err = here(*folders, *TINY, "--no-plots", "--value-range", "0", "255")
        assert status == 0, err
        model = load_model(tmp_path / "output/denoise/own_pairs/model.safetensors")
        assert tuple(model.pretrained_cfg["value_range"]) == (0, 255)
        assert model.data_summary["splits"]["train"]["images"] == 4

    @pytest.mark.parametrize(
        ("args", "needle"),
        [
            (("--noisy", "{root}/half/noisy", "--clean", "{root}/half/clean"), "no "),
            (("--noisy", "{root}/nowhere", "--clean", "{root}/flat/clean"), "nowhere is no folder"),
            (("{root}/flat", "--noisy", "{root}/flat/noisy", "--clean", "clean"), "lies in no"),
            (("--noisy", "{root}/flat/noisy", "--clean", "{root}/inner/clean/test"), "no clean"),
            (
                ("--noisy", "{root}/flat/noisy", "--clean", "{root}/flat/clean", "--test", "set12"),
                "--test set12",
            ),
        ],
    )
    def test_mistakes(self, pairs, here, args, needle):
        status, _, err = here(*[arg.format(root=pairs) for arg in args], *TINY, "--no-plots")
        assert status == 2
        assert err.count("\n") == 1
        assert needle in err


def write_noisy(clean, noisy, suffix=""):
    noisy.mkdir(parents=True)
    for path in sorted(clean.iterdir()):
        pixels = np.asarray(Image.open(path)) // 2  # room for the offset
        Image.fromarray(pixels).save(path)
        Image.fromarray(pixels + 40).save(noisy / f"{path.stem}{suffix}.png")


def test_published_setting_and_overriding(recipe):
    args = recipe.parse_args(["data", "--recipe", "train400-sigma25"])
    assert (args.sigma, args.in_chans, args.train, args.test) == ([25.0], 1, "train400", "set12")
    assert all(
        getattr(args, key) == value for key, value in recipe.RECIPES["train400-sigma25"].items()
    )
    args = recipe.parse_args(
        ["data", "--recipe", "train400-sigma25", "--sigma", "15", "--no-amp", "--epochs", "3"]
    )
    assert (args.sigma, args.amp, args.epochs, args.model) == ([15.0], False, 3, "darknet21")


def test_tiles_change_nothing_where_the_model_sees_single_pixels(recipe):
    from timm_branches import RedNetHead, create_branch_model

    model = create_branch_model(
        "rednet_small",
        taps=[(3, 4)],
        head=RedNetHead(residual=True),
        num_classes=1,
        names=["image"],
        in_chans=1,
    )
    for parameter in model.parameters():
        parameter.data.zero_()
    task, image = recipe.RestorationTask(model, "l1", tile=16), torch.rand(1, 1, 37, 50)
    assert torch.equal(task.answer(model, image)["image"], image)
    shapes = []
    model.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape[2:])))
    task.answer(model, image)
    assert set(shapes) == {(16, 16)}


class TestOverfit:
    def test_small(self, here):
        status, out, err = here("--overfit", "--overfit-size", "32", "--lr", "0.003")
        assert status == 0, err
        rows = read_table(out)[1]
        # the training image, whatever goes in
        for name in ("bottleneck, no skips", "bottleneck and skips"):
            trained, to_target, to_own, blank, noise = rows[name]
            assert min(to_target, blank, noise) > to_own + 5
            assert trained > 15
        _, to_target, to_own, *_ = rows["skips, residual"]
        assert to_own > to_target + 5


MISTAKES = {
    "no folder": (["nowhere"], "nowhere"),
    "file": (["{photos}/note.txt"], "note.txt"),
    "no such part": (["{photos}/parts", "--test", "set12"], "--test set12"),
    "no training": (["{photos}/only"], "--train"),
    "small images": (["{photos}/small"], "at least 11 x 11 pixels"),
    "sigma": (["{photos}/parts", "--sigma", "-1"], "sigma"),
    "range": (["{photos}/parts", "--sigma", "50", "0"], "sigma"),
    "nothing": (["{photos}/parts", "--sigma", "0"], "nothing"),
    "test sigma": (["{photos}/parts", "--test-sigma", "-3"], "sigma"),
    "model": (["{photos}/parts", "--model", "resnet5000"], "resnet5000"),
    "tap": (["{photos}/parts", "--taps", "9"], "9"),
    "channels": (["{photos}/parts", "--channels", "4"], "channels"),
    "tile": (["{photos}/parts", "--tile", "20"], "--tile 20"),
    "val fraction": (["{photos}/plain", "--val-fraction", "1"], "--val-fraction"),
    "resume": (["{photos}/parts", "--resume", "some.safetensors"], "--resume auto"),
    "overfit size": (["--overfit", "--overfit-size", "30"], "--overfit-size 30"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, photos, here):
    args, needle = MISTAKES[name]
    args = [arg.format(photos=photos) for arg in args]
    status, _, err = here(*args[:1], *TINY, "--no-plots", *args[1:])
    assert status == 2
    assert err.startswith("denoise.py: ")
    assert err.count("\n") == 1
    assert needle in err


@pytest.mark.parametrize(
    "args",
    [
        ["--recipe", "train400-sigma25"],
        ["photos", "--overfit"],
        ["--test", "set12"],
        ["photos", "--sigma", "1", "2", "3"],
        ["photos", "--jpeg", "1", "2", "3"],
        ["--noisy", "a", "--clean", "b", "--jpeg", "10"],
        ["photos", "--grey", "--colour"],
        ["--noisy", "a"],
        ["--noisy", "a", "--clean", "b", "--sigma", "25"],
        ["--noisy", "a", "--clean", "b", "--recipe", "train400-sigma25"],
        ["--noisy", "a", "--clean", "b", "--overfit"],
        ["photos", "--clean-suffix", "_gt"],
        ["--value-range", "0", "4095"],
    ],
)
def test_flags_that_do_not_go_together(recipe, capsys, args):
    with pytest.raises(SystemExit) as stopped:
        recipe.parse_args(args)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("error: ") == 1


@pytest.mark.slow
def test_without_arguments_the_network_helps(here):
    status, out, err = here("--no-plots")
    assert status == 0, err
    rows = read_table(out)[1]
    assert rows["noise 25, network"][0] > rows["noise 25, degraded"][0] + 6
    assert rows["blur 1.5, noise 2, network"][0] > rows["blur 1.5, noise 2, degraded"][0] + 1


@pytest.mark.slow
def test_two_processes(photos, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run_recipe(
        RECIPE, photos / "parts", *TINY, "--no-plots", cwd=tmp_path, launcher=launcher
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("PSNR (dB)") == 1
    assert list(read_table(done.stdout)[1])[-1] == "noise 25, network"
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["denoise"]
