"""A model as ONNX or as torch.export's program, with named inputs and outputs, and checked."""

import io
import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from timm_branches.arguments import check_number
from timm_branches.files import replace_file
from timm_branches.hierarchy.decode import DECODERS
from timm_branches.model import BranchModel
from timm_branches.weights import describe_model

__all__ = ["Exported", "export_model"]

FORMATS = (".onnx", ".pt2")
_KEY = "timm_branches"
# a batch that is neither 1 nor that of the check, so that no dimension is taken for a constant
_BATCH = 2


class Exported(NamedTuple):
    """What was written.

    Attributes:
        path: The file.
        input: The input's name and its shape, a text for each dimension that may differ.
        outputs: The outputs' names.
        difference: The largest difference to the model itself that was seen in the check, as a
            part of the largest output.
    """

    path: Path
    input: tuple[str, tuple[int | str, ...]]
    outputs: tuple[str, ...]
    difference: float


class _Named(nn.Module):
    """The model with its outputs as a tuple; behind them what a decoder makes of them."""

    def __init__(self, model: BranchModel, decoder: str | None) -> None:
        super().__init__()
        self.model, self.decoder = model, decoder

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self.model(x)
        if self.decoder is None:
            return tuple(outputs.values())
        tree = self.model.taxonomy
        assert tree is not None
        logits = [outputs[name] for name in self.model.names]
        # not `decode`, which goes piece by piece for the sake of a CPU's cache
        answer = DECODERS[self.decoder]([level.float() for level in logits], tree)
        return (*outputs.values(), *answer)


def export_model(
    model: BranchModel | str | os.PathLike,
    path: str | os.PathLike,
    frames: int | None = None,
    decoder: str | None = None,
) -> Exported:
    """Write a model for other programs, and compare what is written with the model itself.

    The input is `images` (B, C, H, W), or `clips` (B, T, C, H, W) where a head reads clips,
    prepared as the model's own transform does; outputs bear the names of the levels or heads and
    are logits. The batch may have any size; images may, too, where all heads are decoders and the
    backbone allows it. Tree, preprocessing and what else the model's file says are kept inside:
    in ONNX's metadata, in torch.export's extra files, under 'timm_branches', as JSON.

    Args:
        model: A model, or what :func:`timm_branches.load_model` takes.
        path: The file to write, .onnx or .pt2.
        frames: T of the clips, which is fixed in what is written; None is what the model's file
            says of its training.
        decoder: Put one of `timm_branches.hierarchy.decode` inside, such as 'best-path': there are
            two more outputs, `labels` (B, L), -1 below a shallow leaf, and `probabilities` (B, L).

    Returns:
        What was written.

    Raises:
        ValueError: Another ending, a number of frames that is missing or has no effect, a model
            that cannot be exported, or whose export computes something else.
        ImportError: What writes or runs ONNX is not installed.

    Example:
        >>> export_model('model.safetensors', 'model.onnx').outputs  # doctest: +SKIP
        ('coarse', 'fine')
    """
    if not isinstance(model, BranchModel):
        from timm_branches.factory import load_model

        model = load_model(model)
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: the ending says what to write, {' or '.join(FORMATS)}.")
    if path.suffix.lower() == ".onnx":
        _import_onnx()
    shape = _shape(model, frames)
    name = "clips" if model.temporal_heads else "images"
    training = model.training
    model.eval()
    try:
        named = _Named(model, decoder)
        x = _draw(model, (_BATCH, *shape))
        outputs = tuple(model(x))
        if decoder is not None:
            _check_decoder(model, decoder)
            outputs += ("labels", "probabilities")
            named(x)  # what it keeps of the tree is computed now, not in the program
        written: Exported | None = None
        for dynamic in _dynamic_sizes(model):
            try:
                run, save = _export(model, named, x, path, name, outputs, dynamic)
                difference = _compare(model, named, run, shape, resize=len(dynamic) > 1)
            except Exception as error:  # exporters raise whatever they like
                if len(dynamic) > 1:
                    continue  # the backbone has one size
                raise ValueError(
                    f"{model.config['model_name']} with the heads {list(model.names)} cannot be "
                    f"exported: {' '.join(str(error).split())[:300]}"
                ) from error
            dims = [dynamic.get(place, size) for place, size in enumerate(x.shape)]
            replace_file(path, save)
            written = Exported(path, (name, tuple(dims)), outputs, difference)
            break
        assert written is not None
        return written
    finally:
        model.train(training)


def _import_onnx() -> None:
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "ONNX needs onnx, onnxscript and onnxruntime: pip install 'timm_branches[export]'."
        ) from error


def _shape(model: BranchModel, frames: int | None) -> tuple[int, ...]:
    """Of one sample: (C, H, W), of clips (T, C, H, W)."""
    if not model.temporal_heads:
        if frames is not None:
            raise ValueError("frames= has no effect: the model reads no clips.")
        return model.input_size
    if frames is None:
        facts = model.extra.get("frames")
        frames = facts.get("num_frames") if isinstance(facts, dict) else None
        if frames is None:
            raise ValueError("frames= is missing: how many frames has a clip?")
    check_number("frames=", frames, 1, whole=True)
    return (frames, *model.input_size)


def _check_decoder(model: BranchModel, decoder: str) -> None:
    tree = model.taxonomy
    if decoder not in DECODERS:
        raise ValueError(f"decoder={decoder!r}: choose one of {', '.join(DECODERS)}.")
    if tree is None or model.dense_heads:
        raise ValueError("decoder= has no effect on a model without a tree, or with masks.")
    classes = [model.num_classes[name] for name in model.names]
    if classes != list(tree.num_classes):
        raise ValueError(
            f"decoder= takes heads of the tree's levels, with {list(tree.num_classes)} classes; "
            f"the model has {classes}."
        )
    frames = 2 if model.temporal_heads else None
    with torch.no_grad():
        outputs = model(_draw(model, (_BATCH, *_shape(model, frames))))
    if any(y.ndim != 2 for y in outputs.values()):
        raise ValueError("decoder= is for models that answer for a whole clip, not frame by frame.")


def _dynamic_sizes(model: BranchModel) -> list[dict[int, str]]:
    """Which dimensions may differ, the most wanted first."""
    batch = {0: "batch"}
    if len(model.dense_heads) == len(model.names):
        return [batch | {2: "height", 3: "width"}, batch]
    return [batch]


def _draw(model: BranchModel, shape: tuple[int, ...]) -> torch.Tensor:
    """Random input of this shape, the same each time."""
    generator = torch.Generator().manual_seed(0)
    parameter = next(model.parameters())
    return torch.randn(shape, generator=generator).to(parameter.device, parameter.dtype)


def _export(
    model: BranchModel,
    named: _Named,
    x: torch.Tensor,
    path: Path,
    name: str,
    outputs: tuple[str, ...],
    dynamic: dict[int, str],
) -> tuple[Callable[[torch.Tensor], list[torch.Tensor]], Callable[[str], Any]]:
    """What runs the exported model, and what writes it to a file."""
    facts = json.dumps({**describe_model(model), "extra": model.extra, "decoder": named.decoder})
    dims = dict.fromkeys(dynamic, torch.export.Dim.DYNAMIC)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parts of torch's exporter that are to change
        if path.suffix.lower() == ".pt2":
            program = torch.export.export(named, (x,), dynamic_shapes={"x": dims})
            module = program.module()
            archive = io.BytesIO()  # a file would have to end in .pt2 while it is written
            torch.export.save(program, archive, extra_files={_KEY: facts})
            return (
                lambda images: list(module(images)),
                lambda file: Path(file).write_bytes(archive.getvalue()),
            )
        import onnxruntime

        onnx = torch.onnx.export(
            named,
            (x,),
            dynamo=True,
            input_names=[name],
            output_names=[f"{_KEY}_{number}" for number in range(len(outputs))],
            dynamic_shapes={"x": dims},
            verbose=False,
        )
    assert onnx is not None
    _name_outputs(onnx.model.graph, outputs)
    onnx.model.metadata_props[_KEY] = facts
    session = onnxruntime.InferenceSession(
        onnx.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )

    def run(images: torch.Tensor) -> list[torch.Tensor]:
        return [torch.from_numpy(y) for y in session.run(None, {name: images.cpu().numpy()})]

    return run, lambda file: onnx.save(file)


def _name_outputs(graph: Any, outputs: Sequence[str]) -> None:
    """Give the graph's outputs their names, which a value inside it may have (`linear`, `mean`)."""
    for node in graph:
        for value in node.outputs:
            if value.name in outputs:
                value.name = f"{value.name}_inside"
    for value, title in zip(graph.outputs, outputs, strict=True):
        value.name = title


@torch.no_grad()
def _compare(
    model: BranchModel,
    named: nn.Module,
    run: Callable[[torch.Tensor], list[torch.Tensor]],
    shape: tuple[int, ...],
    resize: bool,
) -> float:
    """The largest difference on batches of 1 and 3, and on a larger image where that may be.

    Raises:
        ValueError: What was exported computes something else.
    """
    shapes = [(1, *shape), (3, *shape)]
    if resize:
        channels, height, width = shape
        shapes.append((1, channels, height + 32, width + 64))
    largest = 0.0
    for size in shapes:
        x = _draw(model, size)
        for y, expected in zip(run(x), named(x), strict=True):
            if y.shape != expected.shape:
                raise ValueError(
                    f"the export gives {tuple(y.shape)} where the model gives "
                    f"{tuple(expected.shape)}."
                )
            y, expected = y.float().cpu(), expected.float().cpu()  # labels, too
            scale = float(expected.abs().max().clamp(min=1e-6))
            largest = max(largest, float((y - expected).abs().max()) / scale)
    if not largest < 1e-3:
        raise ValueError(f"the export is off by {largest:.1%} of the largest output.")
    return largest
