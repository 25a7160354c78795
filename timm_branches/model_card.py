"""The card of a model, `README.md` in the Hub's layout, made of the model's own description."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from timm_branches.heads import parse_head
from timm_branches.taxonomy import Taxonomy

__all__ = ["model_card"]

_LONGEST_TREE = 200  # lines


def model_card(
    description: Mapping[str, Any], table: str | None = None, license: str | None = None
) -> str:
    """The text of a model's card.

    Args:
        description: What `describe_model` gives.
        table: Results, in Markdown or as plain text.
        license: The model's licence by the Hub's name (`'mit'`, `'cc-by-4.0'`).

    Raises:
        ValueError: `table` or `license` is no text.
    """
    for name, value in (("table", table), ("license", license)):
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise ValueError(f"{name}= takes a text, got {value!r}.")
    model, cfg = description["model"], description["pretrained_cfg"]
    data = ModelCardData(
        library_name="timm_branches",
        license=license,
        pipeline_tag=_task(model["head"]),
        tags=["timm", "timm_branches"],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {model['model_name']} with {len(model['names'])} head(s)",
        f"A [timm](https://github.com/huggingface/pytorch-image-models) backbone, "
        f"`{model['model_name']}`, with heads at its taps, made with timm_branches.",
        _heads(model),
    ]
    if model.get("taxonomy") is not None:
        parts += ["## Tree", _fenced(_tree(Taxonomy.from_dict(model["taxonomy"])))]
    if table is not None:
        is_markdown = table.lstrip().startswith("|")
        parts += ["## Results", table.strip() if is_markdown else _fenced(table.strip("\n"))]
    parts += ["## Use", _fenced(_usage(model, cfg), "python"), "## Licence"]
    said = "None was stated for this model." if license is None else f"`{license}`"
    parts.append(said)
    return "\n\n".join(parts) + "\n"


def _task(heads: list[dict[str, Any]]) -> str:
    """The Hub's name of what the first head does."""
    head = parse_head(heads[0])
    if head.temporal:
        return "video-classification"
    if not head.dense:
        return "image-classification"
    restores = head.kind == "rednet" or getattr(head, "residual", False)
    return "image-to-image" if restores else "image-segmentation"


def _heads(model: Mapping[str, Any]) -> str:
    lines = ["| head | kind | taps | classes |", "| --- | --- | --- | --- |"]
    for name, head, taps, classes in zip(
        model["names"], model["head"], model["taps"], model["num_classes"], strict=True
    ):
        read = taps if isinstance(taps, list) else [taps]
        places = ", ".join(map(_place, read))
        lines.append(f"| {name} | {head['kind']} | {places} | {classes} |")
    return "\n".join(lines)


def _place(tap: Any) -> str:
    if isinstance(tap, Mapping):
        return str(tap.get("module") or f"stage {tap.get('stage')}")
    return f"stage {tap}" if isinstance(tap, int) else str(tap)


def _tree(taxonomy: Taxonomy) -> str:
    lines = str(taxonomy).splitlines()
    if len(lines) > _LONGEST_TREE:
        lines = [*lines[:_LONGEST_TREE], f"... and {len(lines) - _LONGEST_TREE} more"]
    return "\n".join(lines)


def _usage(model: Mapping[str, Any], cfg: Mapping[str, Any]) -> str:
    shape = list(cfg["input_size"])
    what = "images (B, C, H, W)"
    if any(parse_head(head).temporal for head in model["head"]):
        shape, what = [8, *shape], "clips (B, T, C, H, W)"
    return (
        "import torch\n"
        "from timm.data import create_transform, resolve_data_config\n"
        "from timm_branches import BranchModel\n\n"
        "model = BranchModel.from_pretrained('user/name')  # this repository, or a folder\n"
        "transform = create_transform(**resolve_data_config(model.pretrained_cfg))\n"
        f"x = torch.zeros({', '.join(map(str, [1, *shape]))})  # {what} out of the transform\n"
        "with torch.no_grad():\n"
        "    outputs = model(x)  # by the heads' names\n"
        "for name, y in outputs.items():\n"
        "    print(name, tuple(y.shape))"
    )


def _fenced(text: str, language: str = "") -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"
