"""transformers' Trainer on a branch model: trained, logged, saved and loaded again."""

import json
import warnings

import pytest
import torch

from timm_branches import Taxonomy, create_branch_model

TREE = Taxonomy(["a/x", "a/y", "b/z"])


def made(seed=0):
    torch.manual_seed(seed)
    return create_branch_model("test_resnet", taps=[3, 5], taxonomy=TREE, img_size=32)


def test_config_is_a_dict_that_loggers_can_write():
    model = made()
    assert isinstance(model.config, dict)
    found = json.loads(model.config.to_json_string())
    wanted = {**model.config, "taxonomy": TREE.to_dict()}
    assert model.config.to_dict() == wanted
    assert found == json.loads(json.dumps(wanted))
    again = create_branch_model(**{**found, "taxonomy": Taxonomy.from_dict(found["taxonomy"])})
    assert again.config == model.config
    model.reset_classifier([4, 5])
    assert json.loads(model.config.to_json_string())["num_classes"] == [4, 5]
    odd = create_branch_model("test_resnet", num_classes=2, act_layer=torch.nn.SiLU)
    assert "SiLU" in json.loads(odd.config.to_json_string())["act_layer"]


def loss(outputs, labels, num_items_in_batch=None):
    losses = []
    for logits, target in zip(outputs.values(), labels.unbind(1), strict=True):
        losses.append(torch.nn.functional.cross_entropy(logits, target))
    return sum(losses)


class Recorder:
    """What TensorBoard's writer is given; it stands for all loggers of Trainer."""

    def __init__(self):
        self.texts = {}

    def add_text(self, name, text):
        self.texts[name] = text

    def add_scalar(self, *args):
        pass

    def add_hparams(self, *args):
        pass

    def flush(self):
        pass

    close = flush


def test_trains_saves_and_loads(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from transformers.integrations import TensorBoardCallback, integration_utils

    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    torch.manual_seed(0)
    leaves = [i % 3 for i in range(12)]
    data = []
    for leaf in leaves:
        labels = torch.tensor([leaf // 2, leaf])
        data.append({"x": torch.randn(3, 32, 32) + 2 * leaf, "labels": labels})
    model, recorder = made(), Recorder()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    arguments = transformers.TrainingArguments(
        tmp_path / "run",
        max_steps=2,
        per_device_train_batch_size=6,
        learning_rate=0.01,
        save_steps=2,
        label_names=["labels"],
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )

    def trainer(model):
        callbacks = []
        if TensorBoardCallback is not None:
            callbacks = [TensorBoardCallback(tb_writer=recorder)]
        return transformers.Trainer(
            model,
            arguments,
            train_dataset=data,
            eval_dataset=data,
            compute_loss_func=loss,
            callbacks=callbacks,
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = trainer(model)
        run.train()
        run.save_model(tmp_path / "saved")
        predicted = run.predict(data)
    assert recorder.texts["model_config"] == model.config.to_json_string()
    assert any(not torch.equal(before[k], v) for k, v in model.state_dict().items())
    model.eval()
    with torch.no_grad():
        wanted = model(torch.stack([item["x"] for item in data]))
    for found, name in zip(predicted.predictions, wanted, strict=True):
        torch.testing.assert_close(torch.from_numpy(found), wanted[name])
    # Trainer's own checkpoint, into a model that is built like this one
    for file in ("saved", "run/checkpoint-2"):
        twin = create_branch_model(
            "test_resnet",
            taps=[3, 5],
            taxonomy=TREE,
            img_size=32,
            checkpoint_path=tmp_path / file / "model.safetensors",
        ).eval()
        with torch.no_grad():
            torch.testing.assert_close(
                dict(twin(data[0]["x"][None])), {k: v[:1] for k, v in wanted.items()}
            )
    resumed = trainer(made(seed=1))
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    torch.testing.assert_close(resumed.model.state_dict(), model.state_dict())
