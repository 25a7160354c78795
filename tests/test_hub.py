"""Models in the Hub's layout: a local folder, a stand-in of the Hub, and timm's own way there."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard, ModelHubMixin
from timm.models import save_for_hf

from tests.hub_server import Hub
from timm_branches import BranchModel, Taxonomy, create_branch_model, load_model, save_pretrained
from timm_branches.heads import LSTMHead, RedNetHead, UNetHead

TREE = Taxonomy(["animal/cat", "animal/dog", "thing/car"])
TABLE = "| level | accuracy |\n| --- | --- |\n| fine | 71.5 |"


def small(**kwargs):
    torch.manual_seed(0)
    options = {"taps": [3, 5], "taxonomy": TREE, "img_size": 32, **kwargs}
    return create_branch_model("test_resnet", **options).eval()


def same(model, twin):
    assert type(twin) is BranchModel
    assert not twin.training
    assert twin.config == {**model.config, **twin.config}
    assert twin.taxonomy == model.taxonomy
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=0, atol=0)


class TestFolder:
    def test_round_trip(self, tmp_path):
        model = small()
        model.extra = {"accuracy": 0.5}
        assert isinstance(model, ModelHubMixin)
        assert model.save_pretrained(tmp_path / "hub") is None
        twin = BranchModel.from_pretrained(tmp_path / "hub")
        same(model, twin)
        assert twin.extra == model.extra
        same(model, BranchModel.from_pretrained(str(tmp_path / "hub")))
        # the same as the function writes
        other = save_pretrained(model, tmp_path / "other")
        same(model, load_model(other))
        for name in ("config.json", "README.md"):
            assert (tmp_path / "hub" / name).read_text() == (other / name).read_text()

    def test_a_failed_save_leaves_the_folder(self, tmp_path):
        model = small()
        model.save_pretrained(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        odd = create_branch_model("test_resnet", num_classes=2, act_layer=torch.nn.SiLU)
        with pytest.raises(ValueError, match="made with act_layer="):
            odd.save_pretrained(tmp_path)
        assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def test_refused(self, tmp_path):
        model = small()
        with pytest.raises(ValueError, match="config= has no effect"):
            model.save_pretrained(tmp_path, config={"a": 1})
        with pytest.raises(ValueError, match=r"private, repo_id have no effect without"):
            model.save_pretrained(tmp_path, repo_id="user/x", private=True)
        with pytest.raises(ValueError, match="license= takes a text"):
            model.save_pretrained(tmp_path, model_card_kwargs={"license": 3})
        assert not list(tmp_path.iterdir())
        with pytest.raises(FileNotFoundError, match="no such file"):
            BranchModel.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="[Rr]epo id"):
            BranchModel.from_pretrained("a/b/c/d")

    def test_strict(self, tmp_path):
        model = small()
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["model"]["model_name"] = "test_resnet.r160_in1k"
        config["model"]["taps"] = [4, 5]
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            BranchModel.from_pretrained(tmp_path)


class TestCard:
    def test_says_tree_table_use_and_licence(self, tmp_path):
        small().save_pretrained(tmp_path, model_card_kwargs={"table": TABLE, "license": "mit"})
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.library_name == "timm_branches"
        assert card.data.license == "mit"
        assert card.data.pipeline_tag == "image-classification"
        assert TABLE in card.text
        assert "├─ cat [0]" in card.text
        assert "`mit`" in card.text

    def test_its_code_runs(self, tmp_path, capsys):
        model = small()
        model.save_pretrained(tmp_path)
        (code,) = re.findall(
            r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL
        )
        exec(code.replace("user/name", str(tmp_path)), {})
        wanted = [f"{name} (1, {count})" for name, count in model.num_classes.items()]
        assert capsys.readouterr().out.splitlines() == wanted

    @pytest.mark.parametrize(
        ("options", "task"),
        [
            ({"head": LSTMHead(hidden_size=4), "taps": [5]}, "video-classification"),
            ({"head": UNetHead(), "taps": [(3, 5)]}, "image-segmentation"),
            ({"head": RedNetHead(), "taps": [(3, 5)]}, "image-to-image"),
        ],
    )
    def test_of_other_heads(self, tmp_path, capsys, options, task):
        model = small(taxonomy=None, num_classes=3, **options)
        model.save_pretrained(tmp_path, model_card_kwargs={"table": "a  b\n1  2"})
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.pipeline_tag == task
        assert card.data.license is None
        assert "None was stated" in card.text
        assert "```\na  b\n1  2\n```" in card.text
        (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
        exec(code.replace("user/name", str(tmp_path)), {})
        assert capsys.readouterr().out.startswith(model.names[0])

    def test_one_that_people_wrote_stays(self, tmp_path):
        (tmp_path / "README.md").write_text("mine")
        small().save_pretrained(tmp_path)
        with pytest.warns(UserWarning, match="stays as it is"):
            small().save_pretrained(tmp_path, model_card_kwargs={"license": "mit"})
        assert (tmp_path / "README.md").read_text() == "mine"


class TestTimm:
    @pytest.mark.parametrize("safe", [True, False])
    def test_its_way_of_saving_is_refused_by_name(self, tmp_path, safe):
        with pytest.raises(ValueError, match=r"save_for_hf.*model\.save_pretrained"):
            save_for_hf(small(), tmp_path, safe_serialization=safe)
        assert not (tmp_path / "config.json").exists()

    def test_a_model_that_timm_made_is_refused_as_well(self, tmp_path):
        model = small()
        model._model_args = dict(model._model_args, num_classes=3)  # as timm's create_model does
        with pytest.raises(ValueError, match="cannot save a branch model"):
            save_for_hf(model, tmp_path)


SCRIPT = """
import sys
import torch
from timm_branches import BranchModel, load_model
model = BranchModel.from_pretrained(sys.argv[1])
print(model.push_to_hub('user/birds', token='hf_secret', model_card_kwargs={'license': 'mit'}))
for twin in (
    BranchModel.from_pretrained('user/birds'),
    load_model('hf-hub:user/birds'),
    BranchModel.from_pretrained('user/birds', local_files_only=True, revision='main'),
):
    for key, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[key])
    assert twin.taxonomy == model.taxonomy
model.head('fine' if 'fine' in model.names else model.names[-1]).fc.bias.data += 1
model.save_pretrained(sys.argv[2], push_to_hub=True, repo_id='birds', token='hf_secret')
again = BranchModel.from_pretrained('user/birds')
assert torch.equal(again.head(model.names[-1]).fc.bias, model.head(model.names[-1]).fc.bias)
try:
    BranchModel.from_pretrained('user/none')
except Exception as error:
    print(type(error).__name__)
"""


def test_pushed_to_and_loaded_from_the_hub(tmp_path):
    """HF_ENDPOINT is read when huggingface_hub is imported, hence a process of its own."""
    hub = Hub()
    small().save_pretrained(tmp_path / "model")
    env = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    env.pop("HF_HUB_OFFLINE", None)
    try:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "model"), str(tmp_path / "again")],
            capture_output=True,
            text=True,
            env=env,
            timeout=100,
        )
    finally:
        hub.shutdown()
    assert done.returncode == 0, done.stderr[-3000:]
    first, last = done.stdout.split()
    assert "user/birds" in first
    assert last == "RepositoryNotFoundError"
    assert "Bearer hf_secret" in hub.tokens
    # the card that is there stays
    files = ["config.json", "model.safetensors"]
    assert hub.commits == [["README.md", *files], files]
    assert b"license: mit" in hub.files["user/birds"]["README.md"]
    pushed = tmp_path / "pushed"
    pushed.mkdir()
    for name, data in hub.files["user/birds"].items():
        (pushed / name).write_bytes(data)
    assert load_model(pushed).taxonomy == TREE
