"""Which loss reaches which stage, how strongly, and why one does not.

For losses L_k with weights w_k, g_k = dL_k/dθ over the parameters θ of one stage, and G = sum over
k of w_k g_k, the gradient that the optimizer sees there::

    norm      ‖g_k‖                       Euclidean, over all trainable parameters of the stage
    relative  ‖g_k‖ / ‖θ‖                 a step of SGD with rate lr moves the stage by lr times
                                          that part of it
    share     <w_k g_k, G> / ‖G‖²         what L_k adds to G; shares sum to 1, one below 0 works
                                          against the sum
    cosine    <g_j, g_k> / (‖g_j‖ ‖g_k‖)  1 pulls the same way, below 0 the losses are in conflict
                                          (Yu et al. 2020, "Gradient Surgery", arXiv 2001.06782)

All of them come from the inner products of the g_k, stage by stage, so one backward pass for each
loss is all it takes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import torch
from torch import nn

from timm_branches.gradients.objective import Evaluated, Groups, Losses, Objective, group_by_stage
from timm_branches.gradients.reasons import TOTAL, WHY, Reasons, Silent

__all__ = [
    "Cell",
    "GradientReport",
    "gradient_report",
    "gradients",
    "inner_products",
    "measure",
    "number",
    "table",
]


@dataclass(frozen=True)
class Cell:
    """The gradient of one loss at one stage.

    Attributes:
        head: Name of the loss, or `'total'` for the weighted sum.
        stage: Name of the stage.
        norm: ‖g‖, 0 where nothing arrives.
        relative: ‖g‖ / ‖θ‖, None if the weights are all 0 or frozen.
        share: Of the total gradient at this stage; None if that is 0.
        status: `'ok'`, `'none'` (the loss does not depend on the stage, which need not be
            wrong), `'frozen'`, `'detached'`, `'dead'`, `'zero'`, `'vanishing'` or `'not
            finite'`.
    """

    head: str
    stage: str
    norm: float
    relative: float | None
    share: float | None
    status: str


@dataclass
class GradientReport:
    """Result of :func:`gradient_report`; `print` shows it as text.

    Attributes:
        heads: Names of the losses.
        stages: Names of the stages, in the order of the model.
        losses: Value of each loss.
        weights: Its weight in the sum.
        cells: One for each loss and stage, and for the sum (head `'total'`).
        cosines: `{(head, head): {stage: cosine}}` where both arrive.
        silent: Parameters without a gradient, or without a finite one, of the sum.
        findings: What is worth knowing, in sentences.
        dead: Paths of modules with a dead ReLU; looked for only if a gradient is 0 somewhere.
    """

    heads: list[str]
    stages: list[str]
    losses: dict[str, float]
    weights: dict[str, float]
    cells: list[Cell]
    cosines: dict[tuple[str, str], dict[str, float]]
    silent: list[Silent]
    findings: list[str]
    dead: list[str]

    def cell(self, head: str, stage: str) -> Cell:
        """The cell of a loss (or `'total'`) and a stage.

        Raises:
            KeyError: There is no such loss or stage.
        """
        for cell in self.cells:
            if (cell.head, cell.stage) == (head, stage):
                return cell
        raise KeyError(
            f"{head!r} at {stage!r}: the losses are {self.heads}, the stages {self.stages}."
        )

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The cells as dicts, for a DataFrame or a CSV file."""
        return [asdict(cell) for cell in self.cells]

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form of everything."""
        cosines = []
        for (a, b), by_stage in self.cosines.items():
            for stage, value in by_stage.items():
                cosines.append({"a": a, "b": b, "stage": stage, "cosine": value})
        return {
            "losses": self.losses,
            "weights": self.weights,
            "rows": self.rows,
            "cosines": cosines,
            "silent": [asdict(item) for item in self.silent],
            "findings": self.findings,
            "dead": self.dead,
        }

    def __str__(self) -> str:
        heads = [*self.heads, TOTAL]

        def of(key: str, form: str) -> list[list[str]]:
            lines = []
            for head in heads:
                row = [self.cell(head, stage) for stage in self.stages]
                lines.append([head, *(_cell_text(cell, key, form) for cell in row)])
            return lines

        parts = [
            table("gradient norm", self.stages, of("norm", ".2e")),
            table("relative to the weights", self.stages, of("relative", ".2e")),
            table("share of the total", self.stages, of("share", ".0%")[:-1]),
        ]
        if self.cosines:
            lines = []
            for (a, b), values in self.cosines.items():
                cells = [number(values.get(stage), "+.2f") for stage in self.stages]
                lines.append([f"{a}, {b}", *cells])
            parts.append(table("cosine", self.stages, lines))
        weights = ", ".join(
            f"{name} {self.losses[name]:.4g} (weight {self.weights[name]:.3g})"
            for name in self.heads
        )
        return "\n\n".join(
            [f"losses: {weights}", *parts, *(["\n".join(self.findings)] if self.findings else [])]
        )


def gradient_report(
    model: nn.Module,
    batch: Any,
    losses: Losses | None = None,
    stages: Mapping[str, Any] | None = None,
    weights: Mapping[str, float] | None = None,
    vanishing: float = 1e-6,
) -> GradientReport:
    """Measure each loss' gradient at each stage, and say why some parameters get none.

    The model runs in the mode it is in (call `train()` first to see what training sees) and is
    left as it was: gradients, modes, buffers (BatchNorm's statistics among them) and random number
    generators, also if something fails. Dropout draws from a fixed seed. The cost is a forward
    pass, one backward pass for each loss, and a forward pass for each stage that a loss does not
    reach.

    Args:
        model: Any module, or a task (:class:`timm_branches.task.BranchTask`), which has its losses
            and weights.
        batch: The model's input, or a pair of input and target.
        losses: For a module: a function of (output), or (output, target) if there is a target, that
            returns a scalar or a dict of scalars; or a dict of such functions.
        stages: For each stage a module, or parameters; see :func:`group_by_stage` for what is taken
            by default.
        weights: Of the losses of a module in their sum, 1 each by default.
        vanishing: A relative norm below this counts as vanishing. At the default, SGD with a rate
            of 0.1 changes the weights by less than float32 can hold (relative spacing 1.2e-7).

    Returns:
        A :class:`GradientReport`.

    Raises:
        ValueError: No losses, or one that is no scalar; a stage without parameters of the model.

    Example:
        >>> from timm_branches import create_branch_model
        >>> model = create_branch_model(
        ...     'test_resnet', taps=[3, 5], num_classes=[2, 4], names=['coarse', 'fine'])
        >>> images = torch.randn(4, 3, 64, 64)
        >>> labels = torch.tensor([[0, 1], [0, 0], [1, 2], [1, 3]])
        >>> loss = torch.nn.functional.cross_entropy
        >>> report = gradient_report(model, (images, labels), {
        ...     'coarse': lambda output, y: loss(output['coarse'], y[:, 0]),
        ...     'fine': lambda output, y: loss(output['fine'], y[:, 1])})
        >>> report.cell('coarse', 'stage3').status, report.cell('coarse', 'stage4').status
        ('ok', 'none')
    """
    objective = Objective(model, batch, losses, weights)
    with objective.undisturbed():
        return measure(objective, group_by_stage(objective.module, stages), vanishing)


def measure(objective: Objective, groups: Groups, vanishing: float) -> GradientReport:
    """The report of an objective, inside its `undisturbed()`."""
    evaluated = objective()
    weights = objective.weights_of(evaluated)
    heads = list(evaluated.losses)
    grads = _gradients_by_head(evaluated, groups)
    # the graph is needed no more
    losses = {name: loss.detach() for name, loss in evaluated.losses.items()}
    evaluated = Evaluated(losses, evaluated.total.detach(), None)

    reasons = Reasons(objective, evaluated, groups, grads)
    cells: list[Cell] = []
    cosines: dict[tuple[str, str], dict[str, float]] = {pair: {} for pair in combinations(heads, 2)}
    for stage, group in groups.items():
        live = [p for p in group.values() if p.requires_grad]
        by_head = []
        for name in heads:
            by_head.append([grads[name][id(p)] for p in live])
        gram = inner_products(by_head)
        squares = sum(float(p.detach().double().square().sum()) for p in live)
        size = squares**0.5
        for name, norm, share in _norms_and_shares(gram, weights):
            relative = norm / size if size else None
            status = reasons.status(name, stage, norm, relative, vanishing, weights)
            if status == "not finite":
                cells.append(Cell(name, stage, float("nan"), None, None, status))
            else:
                cells.append(Cell(name, stage, norm, relative, share, status))
        for (first, second), value in _cosines(gram, heads).items():
            cosines[first, second][stage] = value
    measured = {pair: by_stage for pair, by_stage in cosines.items() if by_stage}
    report = GradientReport(
        heads=heads,
        stages=list(groups),
        losses={name: float(loss) for name, loss in losses.items()},
        weights=weights,
        cells=cells,
        cosines=measured,
        silent=reasons.silent(weights),
        findings=[],
        dead=reasons.dead,
    )
    report.findings = _findings(report, groups, objective, vanishing)
    return report


def _gradients_by_head(
    evaluated: Evaluated, groups: Groups
) -> dict[str, dict[int, torch.Tensor | None]]:
    """Each loss's gradients, by the identity of the parameter."""
    parameters: dict[int, nn.Parameter] = {}
    for group in groups.values():
        for parameter in group.values():
            if parameter.requires_grad:
                parameters[id(parameter)] = parameter
    grads = {}
    for name, loss in evaluated.losses.items():
        values = gradients(loss, list(parameters.values()))
        grads[name] = dict(zip(parameters, values, strict=True))
    return grads


def _norms_and_shares(
    gram: torch.Tensor, weights: dict[str, float]
) -> list[tuple[str, float, float | None]]:
    """Of each loss, and of the weighted sum: its gradient's norm, and its share in the sum's.

    Args:
        gram: Inner products of the losses' gradients (K, K).
        weights: Of each loss.
    """
    w = torch.tensor(list(weights.values()), dtype=torch.float64)  # (K,)
    # |sum_k w_k g_k|^2 = w G w; the part of it that is due to k is w_k (G w)_k
    total = float(w @ gram @ w)
    parts = (w * (gram @ w)).tolist()
    norms = gram.diagonal().clamp(min=0).sqrt().tolist()  # NaN stays
    rows: list[tuple[str, float, float | None]] = []
    for name, norm, part in zip(weights, norms, parts, strict=True):
        rows.append((name, norm, part / total if total > 0 else None))
    if math.isnan(total):
        rows.append((TOTAL, total, None))
    else:
        rows.append((TOTAL, max(total, 0.0) ** 0.5, 1.0 if total > 0 else None))
    return rows


def _cosines(gram: torch.Tensor, heads: list[str]) -> dict[tuple[str, str], float]:
    """Cosine between the gradients of each two losses that both have one."""
    norms = gram.diagonal().clamp(min=0).sqrt().tolist()
    cosines = {}
    for a, b in combinations(range(len(heads)), 2):
        if norms[a] > 0 and norms[b] > 0:
            cosines[heads[a], heads[b]] = float(gram[a, b]) / (norms[a] * norms[b])
    return cosines


def _cell_text(cell: Cell, key: str, form: str) -> str:
    """One of a cell's numbers, or why there is none."""
    if cell.status in ("ok", "zero", "dead", "vanishing"):
        return number(getattr(cell, key), form)
    return "-" if cell.status == "none" else cell.status


def gradients(loss: torch.Tensor, parameters: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """dL/dθ of each parameter, None where no path of the graph leads; the graph is kept."""
    if not parameters or not loss.requires_grad:
        return [None] * len(parameters)
    return list(torch.autograd.grad(loss, list(parameters), retain_graph=True, allow_unused=True))


def inner_products(grads: list[list[torch.Tensor | None]]) -> torch.Tensor:
    """<g_j, g_k> (K, K) in float64, of K gradients of the same parameters."""
    gram = torch.zeros(len(grads), len(grads), dtype=torch.float64)
    for parts in zip(*grads, strict=True):
        known: dict[int, torch.Tensor] = {}
        for index, gradient in enumerate(parts):
            if gradient is not None:
                known[index] = gradient.detach().flatten().double()
        for j, a in known.items():
            for k, b in known.items():
                if k <= j:
                    gram[j, k] += float(a @ b)
    return gram + gram.tril(-1).T


def _findings(
    report: GradientReport, groups: Groups, objective: Objective, vanishing: float
) -> list[str]:
    sentences = []
    silent: dict[tuple[str, str], list[str]] = {}
    for item in report.silent:
        silent.setdefault((item.stage, item.reason), []).append(item.parameter)
    for (stage, reason), names in silent.items():
        sentences.append(_silent_sentence(stage, reason, names, len(groups[stage]), report.dead))
    for cell in report.cells:
        if cell.status == "vanishing":
            sentences.append(
                f"{cell.stage}: the gradient of {cell.head} vanishes, {cell.relative:.1e} of the "
                f"weights (below {vanishing:g})."
            )
        elif cell.status == "detached" and cell.head != TOTAL:
            why = "the graph is cut on the way"
            if cell.head in objective.detached_heads:
                why = "as Tap(detach=True) asks for"
            sentences.append(
                f"{cell.stage}: {cell.head} depends on it, but its gradient does not arrive there: "
                f"{why}."
            )
    if objective.off:
        sentences.append(f"off, because their loss weight is 0: {', '.join(objective.off)}.")
    return sentences


def _silent_sentence(stage: str, reason: str, names: list[str], total: int, dead: list[str]) -> str:
    """What to say of a stage's parameters that are not trained for one reason."""
    which = f"all {total} parameters"
    if len(names) < total:
        which = f"{len(names)} of {total} parameters ({_some(names)})"
    if reason == "not finite":
        return f"{stage}: {which} get a gradient that is not finite (NaN or infinity)."
    where = f" (in {_some(dead)})" if reason == "dead" else ""
    return f"{stage}: {which} get no gradient, {WHY[reason]}{where}."


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def number(value: float | None, form: str) -> str:
    """A number in this format, a dash for None."""
    return "-" if value is None else format(value, form)


def table(title: str, columns: list[str], rows: list[list[str]]) -> str:
    """Rows of text below columns of names, aligned."""
    cells = [[title, *columns], *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *others in cells:
        line = first.ljust(widths[0])
        for cell, width in zip(others, widths[1:], strict=True):
            line += "  " + cell.rjust(width)
        lines.append(line.rstrip())
    return "\n".join(lines)
