"""Clips through the task and the loop.

Labels of clips and of frames, ragged batches, a single logit.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from timm_branches import LSTMHead, create_branch_model, load_model
from timm_branches.data import ClipDataset, create_clip_loader, create_transform
from timm_branches.task import BranchTask
from timm_branches.train import FitConfig, evaluate, fit


def make_model(head, num_classes=3, taps=(5,), names=("clip",), **kwargs):
    torch.manual_seed(0)
    return create_branch_model(
        "test_resnet",
        taps=list(taps),
        head=head,
        num_classes=num_classes,
        in_chans=1,
        names=list(names),
        **kwargs,
    )


def clip_head(**kwargs):
    return LSTMHead(hidden_size=8, **kwargs)


def batch(size=3, time=4, levels=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    clips = torch.randn(size, time, 1, 32, 32, generator=generator)
    return (
        clips,
        torch.tensor([4, 2, 3])[:size],
        torch.randint(3, (size, levels), generator=generator),
    )


def test_loss_of_clips():
    task = BranchTask(make_model(clip_head()))
    task.trainable_module.eval()
    clips, lengths, labels = batch()
    want = F.cross_entropy(task.trainable_module(clips, lengths=lengths)["clip"], labels[:, 0])
    torch.testing.assert_close(task((clips, lengths), labels)["loss"], want)
    want = F.cross_entropy(task.trainable_module(clips)["clip"], labels[:, 0])
    torch.testing.assert_close(task(clips, labels)["loss"], want)


@pytest.mark.parametrize("per_frame", [False, True])
def test_loss_of_frames_counts_each_valid_frame_once(per_frame):
    task = BranchTask(make_model(clip_head(output="frame")))
    task.trainable_module.eval()
    clips, lengths, labels = batch()
    if per_frame:
        labels = torch.randint(3, (3, 4, 1), generator=torch.Generator().manual_seed(1))
    logits = task.trainable_module(clips, lengths=lengths)["clip"]
    losses = [
        F.cross_entropy(logits[i, t], labels[i, t, 0] if per_frame else labels[i, 0])
        for i, n in enumerate(lengths.tolist())
        for t in range(n)
    ]
    assert len(losses) == 9
    torch.testing.assert_close(task((clips, lengths), labels)["loss"], torch.stack(losses).mean())


def test_single_logit_is_binary_cross_entropy():
    task = BranchTask(make_model(clip_head(), num_classes=1))
    task.trainable_module.eval()
    clips, lengths, _ = batch()
    labels = torch.tensor([[1], [0], [1]])
    z = task.trainable_module(clips, lengths=lengths)["clip"]
    want = F.binary_cross_entropy_with_logits(z[:, 0], labels[:, 0].float())
    torch.testing.assert_close(task((clips, lengths), labels)["loss"], want)
    evaluator = task.create_evaluator()
    evaluator.update(task.answer(task.trainable_module, (clips, lengths)), labels)
    right = ((z[:, 0] > 0).long() == labels[:, 0]).float().mean()
    assert evaluator.compute()["clip_top1"] == pytest.approx(100 * float(right))


def test_a_branch_for_frames_beside_the_head_for_clips():
    """A frame's coarse label and the clip's class from one pass."""
    model = make_model(
        ["pool", clip_head()], num_classes=[2, 3], taps=(4, 5), names=("frame", "clip")
    )
    task = BranchTask(model, [0.3, 0.7])
    model.eval()
    clips, lengths, _ = batch()
    labels = torch.tensor([[0, 2], [1, 0], [1, 1]])
    outputs = model(clips, lengths=lengths)
    frames = torch.cat([outputs["frame"][i, :n] for i, n in enumerate(lengths.tolist())])
    want = 0.3 * F.cross_entropy(
        frames, labels[:, 0].repeat_interleave(lengths)
    ) + 0.7 * F.cross_entropy(outputs["clip"], labels[:, 1])
    torch.testing.assert_close(task((clips, lengths), labels)["loss"], want)
    answer = task.answer(model, (clips, lengths))
    mean = torch.stack([outputs["frame"][i, :n].mean(0) for i, n in enumerate(lengths.tolist())])
    torch.testing.assert_close(answer["frame"], mean)


def test_what_does_not_go_together():
    clips, lengths, labels = batch()
    with pytest.raises(ValueError, match="output='frame'"):
        BranchTask(make_model(clip_head()))((clips, lengths), labels[:, None].expand(3, 4, 1))
    with pytest.raises(ValueError, match="output='frame'"):
        BranchTask(make_model(clip_head(output="frame")))((clips, lengths), torch.rand(3, 3))


def moving_squares(count=24, time=5, seed=0):
    """Clips of a square that moves to the right (1) or to the left (0): no single frame tells."""
    rng = np.random.default_rng(seed)
    clips, labels = [], []
    for i in range(count):
        steps = np.arange(rng.integers(3, time + 1))
        x = (8 + 4 * steps if i % 2 else 24 - 4 * steps) + rng.integers(-2, 3)
        frames = np.zeros((len(steps), 32, 32), np.uint8)
        for frame, left in zip(frames, x, strict=True):
            frame[12:18, left : left + 6] = 255
        clips.append(frames)
        labels.append(i % 2)
    return clips, labels


@pytest.mark.parametrize("freeze", [False, True])
def test_fit_trains_on_ragged_clips(tmp_path, freeze):
    clips, labels = moving_squares()
    data = ClipDataset(
        clips,
        np.array(labels)[:, None],
        transform=create_transform((1, 32, 32), mean=[0.5], std=[0.5]),
    )
    task = BranchTask(make_model(clip_head(), num_classes=2), verbose=False)
    before = {k: v.clone() for k, v in task.trainable_module.backbone.state_dict().items()}
    config = FitConfig(
        output=str(tmp_path),
        epochs=8,
        opt="adamw",
        lr=5e-3,
        sched="none",
        plots=False,
        progress=False,
        freeze_backbone=freeze,
        device="cpu",
    )
    result = fit(
        task, create_clip_loader(data, 8, is_training=True), create_clip_loader(data, 8), config
    )
    losses = [row["train_loss"] for row in result.history]
    # a random backbone that stays as it is leaves little to learn from
    assert freeze or losses[-1] < 0.9 * losses[0]
    assert len(set(losses)) == 8
    same = [
        torch.equal(v, before[k]) for k, v in task.trainable_module.backbone.state_dict().items()
    ]
    assert all(same) if freeze else not any(same[:3])
    best = BranchTask(load_model(result.model_path))
    assert evaluate(best, create_clip_loader(data, 5)).metrics["clip_top1"] == pytest.approx(
        result.best["clip_top1"]
    )


def test_mixup_is_refused(tmp_path):
    clips, labels = moving_squares(8)
    data = ClipDataset(
        clips,
        np.array(labels)[:, None],
        transform=create_transform((1, 32, 32), mean=[0.5], std=[0.5]),
    )
    config = FitConfig(output=str(tmp_path), epochs=1, plots=False, progress=False, device="cpu")
    with pytest.raises(ValueError, match="not clips"):
        fit(
            BranchTask(make_model(clip_head(), num_classes=2)),
            create_clip_loader(data, 4, is_training=True),
            None,
            config,
            mixup=lambda x, y: (x, y),
        )
