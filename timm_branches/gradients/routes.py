"""The ways a gradient takes through a decoder: each skip, and the trunk.

An encoder with parameters θ gives maps m_1 ... m_n, a decoder reads them all. By the chain rule::

    dL/dθ = sum over i of (dL/dm_i) (dm_i/dθ)

where dL/dm_i holds the other maps fixed (in the decoder) and dm_i/dθ goes through the encoder down
to the beginning. The i-th term is what is left of the gradient when all other maps are detached:
the gradient through path i.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from timm_branches.gradients.objective import Objective, group_by_stage, reproducible
from timm_branches.gradients.report import gradients, inner_products, number, table
from timm_branches.heads.alignment import crop_to
from timm_branches.model import BranchModel

__all__ = ["PathGradients", "path_gradients"]

_FAINT = 1e-2  # a path that brings less than this part of the gradient is hardly there


@dataclass
class PathGradients:
    """Result of :func:`path_gradients`; `print` shows it as text.

    Attributes:
        paths: Names of the paths.
        stages: Names of the encoder's stages.
        norms: `{path: {stage: norm}}` of the gradient through that path alone.
        shares: `{path: {stage: share}}`, <g_path, G> / ‖G‖²: they sum to 1 at each stage where
            anything arrives.
        error: ‖sum of the paths - G‖ / ‖G‖, with G from an ordinary backward pass; rounding, if all
            paths are there.
        findings: What is worth knowing, in sentences.
    """

    paths: list[str]
    stages: list[str]
    norms: dict[str, dict[str, float]]
    shares: dict[str, dict[str, float | None]]
    error: float
    findings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        norms = []
        for path in self.paths:
            norms.append([path, *(number(self.norms[path][s], ".2e") for s in self.stages)])
        shares = []
        for path in self.paths:
            shares.append([path, *(number(self.shares[path][s], ".1%") for s in self.stages)])
        return "\n\n".join(
            [
                table("gradient norm through", self.stages, norms),
                table("share of the gradient", self.stages, shares),
                "\n".join(
                    [
                        f"the paths add up to the gradient: relative error {self.error:.1e}",
                        *self.findings,
                    ]
                ),
            ]
        )


def path_gradients(
    model: nn.Module,
    batch: Any,
    loss: Callable[..., torch.Tensor],
    head: str | None = None,
    encode: Callable[[Any], Mapping[str, torch.Tensor] | Sequence[torch.Tensor]] | None = None,
    decode: Callable[..., Any] | None = None,
    stages: Mapping[str, Any] | None = None,
) -> PathGradients:
    """Measure the gradient through each skip of a decoder, and through the trunk, apart.

    The model runs in the mode it is in and is left as it was, as by :func:`gradient_report`.

    Args:
        model: A branch model with a decoder, or any module.
        batch: The input, or a pair of input and target.
        loss: A function of (output) or (output, target) that returns a scalar; the output is that
            of the head.
        head: The branch model's head to look at, which may be left out if it has one decoder.
        encode: For another module: its encoder, a function from the input to its maps, as a dict by
            name or in order.
        decode: And its decoder: `decode(*maps)` gives the output.
        stages: Of the encoder, as :func:`gradient_report` takes them. Stages that no path reaches
            are left out.

    Returns:
        A :class:`PathGradients`. The paths of a branch model are `'trunk (<tap>)'`, through the
        deepest map, and `'skip (<tap>)'`.

    Raises:
        ValueError: No or several decoders and no `head`, or only one of `encode` and
            `decode`.

    Example:
        >>> from timm_branches import create_branch_model
        >>> model = create_branch_model(
        ...     'test_resnet', taps=[[2, 3, 5]], head='rednet', num_classes=3, img_size=32)
        >>> noisy, clean = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
        >>> path_gradients(model, (noisy, clean), torch.nn.functional.mse_loss).paths
        ['trunk (stage5)', 'skip (stage3)', 'skip (stage2)']
    """
    objective = Objective(model, batch, loss)
    if isinstance(model, BranchModel) and encode is None and decode is None:
        encode, decode, run = _encoder_decoder(model, head, objective.input)
    elif encode is None or decode is None or head is not None:
        raise ValueError(
            "give encode= and decode= (and no head=) for a module that is no branch model: "
            "functions from the input to the maps, and from the maps to the output."
        )
    else:
        whole_encode, whole_decode = encode, decode

        def run(x: Any) -> Any:
            maps = whole_encode(x)
            return whole_decode(*(maps.values() if isinstance(maps, Mapping) else maps))

    groups: dict[str, dict[str, nn.Parameter]] = {}
    for stage, group in group_by_stage(model, stages).items():
        groups[stage] = {name: p for name, p in group.items() if p.requires_grad}
    parameters: dict[int, nn.Parameter] = {}
    for group in groups.values():
        parameters |= {id(p): p for p in group.values()}
    with objective.undisturbed():
        maps, leaves, value = _split(encode, decode, loss, objective)
        slopes = gradients(value, list(leaves.values()))
        through: dict[str, dict[int, torch.Tensor | None]] = {}
        findings = []
        for (name, map_), slope in zip(maps.items(), slopes, strict=True):
            grads: list[torch.Tensor | None] = [None] * len(parameters)
            if slope is None or not slope.any():
                findings.append(
                    f"{name}: no gradient arrives at its map: the decoder does not use it, or cuts "
                    "it off."
                )
            elif map_.requires_grad:
                targets = list(parameters.values())
                grads = list(
                    torch.autograd.grad(map_, targets, slope, retain_graph=True, allow_unused=True)
                )
            elif parameters:
                findings.append(
                    f"{name}: its map is detached, so its gradient does not reach the encoder."
                )
            through[name] = dict(zip(parameters, grads, strict=True))
        del maps
        with reproducible(objective.device):  # an ordinary pass, nothing detached
            value = loss(run(objective.input.clone()), *objective.targets)
        full = dict(zip(parameters, gradients(value, list(parameters.values())), strict=True))
        return _compare(groups, through, full, findings)


def _encoder_decoder(
    model: BranchModel, head: str | None, x: torch.Tensor
) -> tuple[Callable, Callable, Callable]:
    """Encoder, decoder and both in one, for a head."""
    decoders = list(model.dense_heads)
    if head is None and len(decoders) != 1:
        raise ValueError(
            f"the model has the decoders {decoders}: give head= to choose one."
            if decoders
            else f"the model has no decoder, its heads are {list(model.names)}."
        )
    if head is not None and head not in decoders:
        raise ValueError(f"head={head!r}: the model's decoders are {decoders}.")
    name = decoders[0] if head is None else head
    (which,) = model.head_indices([name])
    module: Any = model.head(name)
    infos = [model.taps[i] for i in model.head_taps[which]]
    order = getattr(module, "order", list(range(len(infos))))  # the deepest first

    def encode(images: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = model.head_maps(model.align(images, [which]), [which])[name]
        named = {}
        kind = "trunk"
        for index in order:
            named[f"{kind} ({infos[index].tap.name})"] = maps[index]
            kind = "skip"
        return named

    def decode(*maps: torch.Tensor) -> Any:
        by_tap = dict(zip(order, maps, strict=True))
        output = module(*(by_tap[i] for i in range(len(maps))), image=model.align(x, [which]))
        return crop_to(output, x.shape[2:])

    return encode, decode, lambda images: model(images, heads=[name])[name]


def _split(
    encode: Callable, decode: Callable, loss: Callable, objective: Objective
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
    """The encoder's maps, the same as leaves, and the loss of what the decoder makes of these."""
    with reproducible(objective.device):
        given = encode(objective.input.clone())
        if not isinstance(given, Mapping):
            given = {f"map {index}": map_ for index, map_ in enumerate(given)}
        maps = dict(given)
        leaves = {name: m.detach().requires_grad_() for name, m in maps.items()}
        # clones, because a decoder may work in place and a leaf must not be changed
        value = loss(decode(*(leaf.clone() for leaf in leaves.values())), *objective.targets)
    return maps, leaves, value


def _compare(
    groups: dict[str, dict[str, nn.Parameter]],
    through: dict[str, dict[int, torch.Tensor | None]],
    full: dict[int, torch.Tensor | None],
    findings: list[str],
) -> PathGradients:
    """Norm and share of each path at each stage.

    Args:
        groups: Trainable parameters by stage.
        through: For each path the gradients through it, by the identity of the parameter.
        full: Those of an ordinary pass.
        findings: What is known so far; what is found here is added.
    """
    norms: dict[str, dict[str, float]] = {path: {} for path in through}
    shares: dict[str, dict[str, float | None]] = {path: {} for path in through}
    stages, off, size = [], 0.0, 0.0
    for stage, group in groups.items():
        reached = [id(p) for p in group.values() if _is_reached(id(p), through)]
        if not reached:  # the decoder's own, or another head's
            continue
        stages.append(stage)
        rows = []
        for grads in through.values():
            rows.append([grads[key] for key in reached])
        rows.append([full[key] for key in reached])
        gram = inner_products(rows)  # (paths + 1, paths + 1), the last of the full gradient
        total = float(gram[-1, -1])
        for index, path in enumerate(through):
            norms[path][stage] = max(float(gram[index, index]), 0.0) ** 0.5
            shares[path][stage] = float(gram[index, -1]) / total if total > 0 else None
        size += total
        for key in reached:
            off += _squared_difference([grads[key] for grads in through.values()], full[key])
    if not stages:
        findings = [*findings, "no path reaches a trainable parameter of the encoder."]
    else:
        findings = [*findings, *_faint_paths(shares, stages[0], findings)]
    error = (off / size) ** 0.5 if size else 0.0
    return PathGradients(list(through), stages, norms, shares, error, findings)


def _is_reached(key: int, through: Mapping[str, Mapping[int, torch.Tensor | None]]) -> bool:
    """Whether any path brings a gradient to a parameter."""
    return any(grads[key] is not None for grads in through.values())


def _squared_difference(parts: Sequence[torch.Tensor | None], whole: torch.Tensor | None) -> float:
    """How far the sum of the paths' gradients is off the whole one."""
    difference = torch.zeros((), dtype=torch.float64)
    for part in parts:
        if part is not None:
            difference = difference + part.double()
    if whole is not None:
        difference = difference - whole.double()
    return float(difference.square().sum())


def _faint_paths(
    shares: Mapping[str, Mapping[str, float | None]], stage: str, findings: Sequence[str]
) -> list[str]:
    """Sentences on paths that bring next to nothing to the first stage."""
    if len(shares) < 2:
        return []
    sentences = []
    for path, by_stage in shares.items():
        share = by_stage[stage]
        already_said = any(sentence.startswith(f"{path}:") for sentence in findings)
        if share is not None and abs(share) < _FAINT and not already_said:
            sentences.append(
                f"{path}: brings {share:.2%} of the gradient at {stage}, less than {_FAINT:.0%}: "
                "the network learns there almost only through the other paths."
            )
    return sentences
