"""What a model's file keeps of its data so that it can be asked: classes, colours, frames."""

from typing import Any

from timm_branches.data.bad_images import TolerantDataset

__all__ = ["facts_of_inputs"]


def facts_of_inputs(loader: Any) -> dict[str, Any]:
    """What answers of a model depend on beside its configuration, JSON-safe.

    Args:
        loader: Batches as in evaluation, or None.

    Returns:
        Of masks `classes` and, where the data have some, `colors` (three numbers from 0 to 255
        each); of clips `frames`: how many are looked at, and which.
    """
    dataset: Any = getattr(loader, "dataset", None)
    while isinstance(dataset, TolerantDataset) or "dataset" in getattr(dataset, "__dict__", {}):
        dataset = dataset.dataset
    facts: dict[str, Any] = {}
    if hasattr(dataset, "mask_colors"):
        facts["classes"] = list(dataset.classes)
        colors = _colors(dataset.mask_colors, len(dataset.classes))
        if colors is not None:
            facts["colors"] = colors
    sampler: Any = getattr(dataset, "sampler", None)
    if hasattr(sampler, "num_frames"):
        facts["frames"] = {
            "num_frames": sampler.num_frames,
            "sampling": sampler.sampling,
            "stride": sampler.stride,
        }
        if sampler.rate is not None:
            facts["frames"]["rate"] = sampler.rate
    return facts


def _colors(table: Any, count: int) -> list[list[int]] | None:
    """The colour of each class; None where one has none, or only a grey value."""
    if table is None:
        return None
    colors: dict[int, list[int]] = {}
    for color, index in table.index.items():
        if len(color) != 3:
            return None
        colors.setdefault(index, [int(value) for value in color])
    if not set(range(count)) <= colors.keys():
        return None
    return [colors[index] for index in range(count)]
