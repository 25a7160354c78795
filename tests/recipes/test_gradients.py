"""``recipes/gradients.py`` as a user runs it.

The story without arguments, and one model of one's own.
"""

import pytest
from PIL import Image

from tests.recipes.script import RECIPES
from timm_branches import create_branch_model, load_model, save_model

RECIPE = RECIPES / "gradients.py"
MODEL = ("--model", "test_resnet", "--img-size", "32", "-b", "2", "--num-classes", "3")


def pictures(folder):
    """Names of the pictures in a folder, each of which opens."""
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            image.verify()
    return {path.name for path in folder.iterdir()}


def after(text, start, stop):
    """What stands between two pieces of text."""
    return text.split(start, 1)[1].split(stop, 1)[0]


def test_the_story(here, tmp_path):
    status, out, err = here()
    assert status == 0, err
    assert pictures(tmp_path / "output" / "gradients") == {
        "branches.png",
        "frames.png",
        "overview.png",
        "paths.png",
        "kernels.png",
    }
    # the weights of the B-CNN's schedule: at first the coarse head has nearly all of the loss, in
    # the end none
    assert "from epoch  0, weights [0.98, 0.01, 0.01]: coarse 9" in out
    assert "from epoch 29, weights [0.0, 0.0, 1.0]: coarse 0%, middle 0%, fine 100%" in out
    assert "off, because their loss weight is 0: coarse, middle." in out
    assert out.count("at the deepest stage that all levels share: ") == 3
    # which frames the loss sees: a short memory, none, and a CNN that learns nothing
    assert "fades over time" in after(out, "read at the last: 30 of 30 frames seen.", "the same")
    assert (
        after(out, "all outputs read: 30 of 30 frames seen.", "by hand").strip()
        == "Nothing wrong found."
    )
    lost = after(out, "state lost between frames: 1 of 30 frames seen.", "by hand")
    assert "only the last frame (29, counted from 0)" in lost
    assert "without autograd" not in lost
    assert "cnn is run without autograd" in after(
        out, "seen, but nothing reaches the CNN.", "3. A skip decoder"
    )
    # the decoder's paths, and the kernels
    assert "trunk (stage5): brings" in out
    assert "the paths add up to the gradient" in out
    assert after(out, "\nhealthy:", "\nequal input").strip() == "Nothing found."
    assert "identical" in after(out, "\nequal input channels:", "\nbroadcast target:")
    # the doctor
    assert "problem" not in after(out, "\nB-CNN\n", "CNN+LSTM by hand\n")
    ill = after(out, "CNN+LSTM by hand\n", "Pictures")
    for words in (
        "take the softmax out",
        "no_grad()",
        "does not depend on the frames [0, 1, 2, 3, 4]",
    ):
        assert words in ill


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ["--taps", "3", "5"],
            ["heads stage3, stage5 on random input (2, 3, 32, 32)", "stage3, stage5"],
        ),
        (
            ["--head", "gru", "--frames", "3"],
            ["random input (2, 3, 3, 32, 32)", "the loss sees every frame."],
        ),
        (
            ["--head", "rednet", "--taps", "3", "5"],
            ["trunk (stage5)", "skip (stage3)", "relative error"],
        ),
        (["--head", "unet"], ["trunk (stage5)", "skip (stage1)"]),
        (["--num-classes", "1"], ["heads stage5"]),
    ],
    ids=["pool", "gru", "rednet", "unet", "one number"],
)
def test_own_model(here, tmp_path, args, words):
    status, out, err = here(*MODEL, *args, "--output", "mine")
    assert status == 0, err
    for text in (*words, "gradient norm", "\npassed: forward pass"):
        assert text in out
    assert pictures(tmp_path / "mine") == {"report.png"}


def test_checkpoint(here, tmp_path):
    save_model(
        create_branch_model(
            "test_resnet", taps=[4, 5], num_classes=[2, 3], names=["coarse", "fine"], img_size=32
        ),
        tmp_path / "model.safetensors",
    )
    status, out, err = here("--checkpoint", "model.safetensors", "-b", "3")
    assert status == 0, err
    assert "heads coarse, fine on random input (3, 3, 32, 32)" in out


def test_checkpoint_into_a_model(here, tmp_path):
    """The weights are the file's: a head of zeros passes nothing on, which a new model's would."""
    model = create_branch_model("test_resnet", num_classes=3, img_size=32)
    for parameter in model.head("stage5").parameters():
        parameter.data.zero_()
    path = save_model(model, tmp_path / "model.safetensors")
    assert not load_model(path).head("stage5").fc.weight.any()
    status, out, err = here(*MODEL, "--checkpoint", path)
    assert status == 0, err
    assert "stage5: all 9 parameters get no gradient" in out
    assert "stage5: all 9 parameters" not in here(*MODEL)[1]


def test_an_earlier_run_is_kept(here, tmp_path):
    old = tmp_path / "mine" / "report.png"
    old.parent.mkdir()
    old.write_bytes(b"old")
    status, out, _ = here(*MODEL, "--output", "mine")
    assert status == 0
    assert old.read_bytes() == b"old"
    assert "Pictures: mine-1" in out
    assert pictures(tmp_path / "mine-1") == {"report.png"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "resnet5000"], "resnet5000"),
        ([*MODEL, "--taps", "9"], "no stage 9"),
        ([*MODEL, "--frames", "3"], "--frames has no effect"),
        (["--checkpoint", "nowhere.safetensors"], "nowhere.safetensors"),
        ([*MODEL, "--output", __file__], "test_gradients.py"),
    ],
)
def test_mistakes_are_one_line(here, tmp_path, args, message):
    status, _, err = here(*args)
    assert status == 2
    assert err.startswith("gradients.py: ")
    assert err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []  # no folder without pictures


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--taps", "3"], "--taps has no effect without --model"),
        (["--batch-size", "3"], "--batch-size has no effect"),
        (["--checkpoint", "model.safetensors", "--head", "pool"], "the checkpoint says itself"),
        ([*MODEL, "--frames", "0"], "must be above 0, got 0"),
        ([*MODEL, "--head", "perceiver"], "perceiver"),
    ],
)
def test_flags_that_do_not_go(here, args, message):
    status, _, err = here(*args)
    assert status == 2
    assert message in err.splitlines()[-1]
