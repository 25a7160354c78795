"""The doctor, the report and the paths on every head, sound and with a planted fault."""

import pytest
import torch
import torch.nn.functional as F

from timm_branches import create_branch_model
from timm_branches.gradients import check_model, frame_gradients, gradient_report
from timm_branches.heads import (
    AttentionHead,
    LSTMHead,
    MeanHead,
    MinGRUHead,
    TCNHead,
    TransformerHead,
    attention,
)

TIME = 5
OF_TIME = [
    MeanHead(),
    AttentionHead(hidden_size=8, num_heads=2),
    TransformerHead(hidden_size=8, num_heads=2),
    TransformerHead(hidden_size=8, num_heads=2, num_layers=2, mlp_ratio=2, causal=True),
    TransformerHead(hidden_size=8, num_heads=2, pool_type="none", output="frame"),
    TCNHead(hidden_size=6, num_layers=2, output="frame"),
    MinGRUHead(hidden_size=6, num_layers=2, projection=5),
    LSTMHead(hidden_size=6, output="frame"),
]


def make(head):
    torch.manual_seed(0)
    return create_branch_model("test_resnet", head=head, num_classes=3, img_size=32)


def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, TIME, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 0])


def loss(output, target):
    y = output["stage5"] if isinstance(output, dict) else output
    if y.ndim == 3:
        return F.cross_entropy(y.flatten(0, 1), target.repeat_interleave(TIME))
    return F.cross_entropy(y, target)


@pytest.mark.parametrize("head", OF_TIME, ids=lambda head: head.kind)
class TestSound:
    def test_doctor(self, head):
        assert check_model(make(head), batch(), loss).problems == []

    def test_report(self, head):
        report = gradient_report(make(head), batch(), loss)
        assert not [item for item in report.silent if item.parameter.startswith("heads.")]

    def test_frames(self, head):
        found = frame_gradients(make(head), batch(), loss)
        assert found.seen == list(range(TIME))
        assert not found.findings

    def test_detached_tokens(self, head):
        """A head that is fed without autograd trains no backbone, and that is said."""
        model = make(head)
        part = model.head("stage5").to_vector
        forward = part.forward
        part.forward = lambda x: forward(x.detach())
        silent = {item.parameter for item in gradient_report(model, batch(), loss).silent}
        assert {n for n, _ in model.named_parameters() if n.startswith("backbone.")} <= silent
        assert not check_model(model, batch(), loss).ok


def look_ahead(monkeypatch):
    """A mask that hides nothing of the clip."""
    causal = attention._TransformerClassifier._causal

    def leaking(self, x, clips, state):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "masked_fill", lambda y, mask, value: y)
            return causal(self, x, clips, state)

    monkeypatch.setattr(attention._TransformerClassifier, "_causal", leaking)


def test_mask_that_lets_the_future_in(monkeypatch):
    look_ahead(monkeypatch)
    head = TransformerHead(hidden_size=8, num_heads=2, causal=True, output="frame")
    (problem,) = check_model(make(head), batch(), loss).problems
    assert "the frames 0 to 1 of a clip depends on the frames behind them" in problem


def test_future_in_a_clips_answer(monkeypatch):
    look_ahead(monkeypatch)
    head = TransformerHead(hidden_size=8, num_heads=2, num_layers=2, causal=True)
    problems = check_model(make(head), batch(), loss).problems
    assert any("in two pieces gets another answer" in problem for problem in problems)


@pytest.mark.parametrize("head", [h for h in OF_TIME if h.kind in ("tcn", "mingru", "mean")])
def test_state_that_is_not_handed_on(head):
    model = make(head)
    module = model.head("stage5")
    over_time = module.over_time
    module.over_time = lambda y, clips, state: over_time(y, clips, None)
    (problem,) = check_model(model, batch(), loss).problems
    assert "in two pieces gets another answer" in problem
