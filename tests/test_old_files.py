"""Files of earlier versions are read for ever: those in tests/fixtures were written by them."""

import shutil
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

from timm_branches import load_model
from timm_branches.task import BranchTask
from timm_branches.train import FitConfig, fit
from timm_branches.train.checkpoint import load_state

FIXTURES = Path(__file__).parent / "fixtures"


def batch(taxonomy):
    """The images and labels that the model of the fixtures was trained on."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 1, 32, 32, generator=generator)
    return images, taxonomy.expand(torch.randint(0, 10, (8,), generator=generator))


def test_a_model_of_version_1():
    model = load_model(FIXTURES / "model-1.safetensors")
    images, _ = batch(model.taxonomy)
    with torch.no_grad():
        logits = model(images[:1])
    # as the version that wrote it gave them
    expected = {
        "parity": [0.009629369, -0.031419378],
        "digit": [
            0.005175584,
            -0.019570978,
            -0.031417221,
            -0.047804452,
            0.126801416,
            0.095369920,
            0.006476630,
            -0.034611642,
            -0.004693050,
            0.002900521,
        ],
    }
    assert list(logits) == list(expected)
    for level, values in expected.items():
        torch.testing.assert_close(logits[level][0], torch.tensor(values), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_version_1(tmp_path):
    """It is read, and a run goes on from it."""
    path = shutil.copy(FIXTURES / "checkpoint-1.safetensors", tmp_path / "last.safetensors")
    state = load_state(path)
    assert (state["epoch"], state["updates"]) == (0, 2)
    model = load_model(FIXTURES / "model-1.safetensors")
    data = TensorDataset(*batch(model.taxonomy))
    config = FitConfig(
        output=str(tmp_path / "run"),
        resume=str(path),
        epochs=2,
        lr=0.01,
        progress=False,
        plots=False,
        device="cpu",
    )
    result = fit(BranchTask(model), DataLoader(data, 4), None, config)
    assert [row["epoch"] for row in result.history] == [1]


def test_a_checkpoint_of_version_2(tmp_path):
    """It was written inside an epoch, after the second of its four batches, with an average."""
    path = shutil.copy(FIXTURES / "checkpoint-2.safetensors", tmp_path / "last.safetensors")
    state = load_state(path)
    assert (state["epoch"], state["updates"]) == (0, 6)
    assert [process["batch"] for process in state["inside"]["processes"]] == [2]
    model = load_model(FIXTURES / "model-1.safetensors")
    data = TensorDataset(*batch(model.taxonomy))
    config = FitConfig(
        output=str(tmp_path / "run"),
        resume=str(path),
        epochs=3,
        lr=0.01,
        model_ema=True,
        progress=False,
        plots=False,
        device="cpu",
    )
    result = fit(BranchTask(model), DataLoader(data, 2), None, config)
    assert [row["epoch"] for row in result.history] == [1, 2]
