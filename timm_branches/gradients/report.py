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

from collections import Counter
from collections.abc import Mapping
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
        return {
            "losses": self.losses,
            "weights": self.weights,
            "rows": self.rows,
            "cosines": [
                {"a": a, "b": b, "stage": stage, "cosine": value}
                for (a, b), values in self.cosines.items()
                for stage, value in values.items()
            ],
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
                lines.append(
                    [
                        head,
                        *(
                            number(getattr(c, key), form)
                            if c.status in ("ok", "zero", "dead", "vanishing")
                            else "-"
                            if c.status == "none"
                            else c.status
                            for c in row
                        ),
                    ]
                )
            return lines

        parts = [
            table("gradient norm", self.stages, of("norm", ".2e")),
            table("relative to the weights", self.stages, of("relative", ".2e")),
            table("share of the total", self.stages, of("share", ".0%")[:-1]),
        ]
        if self.cosines:
            parts.append(
                table(
                    "cosine",
                    self.stages,
                    [
                        [f"{a}, {b}", *(number(values.get(stage), "+.2f") for stage in self.stages)]
                        for (a, b), values in self.cosines.items()
                    ],
                )
            )
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
    found = objective()
    parameters = {id(p): p for group in groups.values() for p in group.values() if p.requires_grad}
    grads = {
        name: gradients(loss, list(parameters.values())) for name, loss in found.losses.items()
    }
    by_id = {name: dict(zip(parameters, values, strict=True)) for name, values in grads.items()}
    slopes = objective.weights_of(found)
    heads, stages = list(found.losses), list(groups)
    values = {name: float(loss.detach()) for name, loss in found.losses.items()}
    found = Evaluated(
        {name: loss.detach() for name, loss in found.losses.items()}, found.total.detach(), None
    )

    reasons = Reasons(objective, found, groups, by_id)
    cells: list[Cell] = []
    cosines: dict[tuple[str, str], dict[str, float]] = {pair: {} for pair in combinations(heads, 2)}
    w = torch.tensor([slopes[name] for name in heads], dtype=torch.float64)
    for stage, group in groups.items():
        live = [p for p in group.values() if p.requires_grad]
        gram = inner_products([[by_id[name][id(p)] for p in live] for name in heads])
        size = sum(float(p.detach().double().square().sum()) for p in live) ** 0.5
        total = float(w @ gram @ w)
        norms = gram.diagonal().clamp(min=0).sqrt().tolist()  # NaN stays
        shares: list[float | None] = [
            float(s) if total > 0 else None for s in w * (gram @ w) / (total or 1.0)
        ]
        norms.append(max(total, 0.0) ** 0.5 if total == total else total)
        for name, norm, share in zip(
            [*heads, TOTAL], norms, [*shares, 1.0 if total > 0 else None], strict=True
        ):
            relative = norm / size if size else None
            status = reasons.status(name, stage, norm, relative, vanishing, slopes)
            finite = status != "not finite"
            cells.append(
                Cell(
                    name,
                    stage,
                    norm if finite else float("nan"),
                    relative if finite else None,
                    share if total == total and finite else None,
                    status,
                )
            )
        for a, b in combinations(range(len(heads)), 2):
            if norms[a] > 0 and norms[b] > 0:
                cosines[heads[a], heads[b]][stage] = float(gram[a, b]) / (norms[a] * norms[b])
    silent = reasons.silent(slopes)
    report = GradientReport(
        heads,
        stages,
        values,
        slopes,
        cells,
        {k: v for k, v in cosines.items() if v},
        silent,
        [],
        reasons.dead,
    )
    report.findings = _findings(report, groups, objective, vanishing)
    return report


def gradients(loss: torch.Tensor, parameters: list[nn.Parameter]) -> list[torch.Tensor | None]:
    """dL/dθ of each parameter, None where no path of the graph leads; the graph is kept."""
    if not parameters or not loss.requires_grad:
        return [None] * len(parameters)
    return list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))


def inner_products(grads: list[list[torch.Tensor | None]]) -> torch.Tensor:
    """<g_j, g_k> (K, K) in float64, of K gradients of the same parameters."""
    gram = torch.zeros(len(grads), len(grads), dtype=torch.float64)
    for parts in zip(*grads, strict=True):
        here = [None if g is None else g.detach().flatten().double() for g in parts]
        for j, a in enumerate(here):
            for k, b in enumerate(here[: j + 1]):
                if a is not None and b is not None:
                    gram[j, k] += float(a @ b)
    return gram + gram.tril(-1).T


def _findings(
    report: GradientReport, groups: Groups, objective: Objective, vanishing: float
) -> list[str]:
    sentences = []
    count = Counter((item.stage, item.reason) for item in report.silent)
    for (stage, reason), number in count.items():
        names = [
            item.parameter for item in report.silent if (item.stage, item.reason) == (stage, reason)
        ]
        every = number == len(groups[stage])
        which = (
            f"all {number} parameters"
            if every
            else f"{number} of {len(groups[stage])} parameters ({_some(names)})"
        )
        where = f" (in {_some(report.dead)})" if reason == "dead" else ""
        sentences.append(
            f"{stage}: {which} get no gradient, {WHY[reason]}{where}."
            if reason != "not finite"
            else f"{stage}: {which} get a gradient that is not finite (NaN or infinity)."
        )
    for cell in report.cells:
        if cell.status == "vanishing":
            sentences.append(
                f"{cell.stage}: the gradient of {cell.head} vanishes, {cell.relative:.1e} of the "
                f"weights (below {vanishing:g})."
            )
        elif cell.status == "detached" and cell.head != TOTAL:
            why = (
                "as Tap(detach=True) asks for"
                if cell.head in objective.detached_heads
                else "the graph is cut on the way"
            )
            sentences.append(
                f"{cell.stage}: {cell.head} depends on it, but its gradient does not arrive there: "
                f"{why}."
            )
    if objective.off:
        sentences.append(f"off, because their loss weight is 0: {', '.join(objective.off)}.")
    return sentences


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def number(value: float | None, form: str) -> str:
    """A number in this format, a dash for None."""
    return "-" if value is None else format(value, form)


def table(title: str, columns: list[str], rows: list[list[str]]) -> str:
    """Rows of text below columns of names, aligned."""
    cells = [[title, *columns], *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )
