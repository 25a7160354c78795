"""What every evaluator offers: the contract between tasks, `evaluate`, `fit`, logs and tables."""

from collections.abc import Sequence
from typing import Any, Protocol

__all__ = ["Evaluator"]


class Evaluator(Protocol):
    """Counts batches and gives metrics by name; a task's `create_evaluator` makes a fresh one.

    Optional is `confusion_matrices()`, for a task that draws them.

    Attributes:
        metrics: What :meth:`compute` returned last; `evaluate` sets it.
    """

    metrics: Any

    @property
    def metric_names(self) -> Sequence[str]:
        """What :meth:`compute` returns, in this order."""

    @property
    def headline(self) -> Sequence[str]:
        """The few of them that are worth a line each epoch."""

    def update(self, output: Any, target: Any) -> None:
        """Take one batch: what the model returned, and the targets."""

    def compute(self, distributed: bool = False) -> Any:
        """All metrics by name, as a mapping to floats; nan for one without a sample.

        Args:
            distributed: Join the counts of all processes first.
        """

    def lower_is_better(self, name: str) -> bool:
        """Whether a metric is the better the smaller it is."""

    def reset(self) -> None:
        """Forget all samples."""
