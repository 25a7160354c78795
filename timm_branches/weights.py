"""Model files: everything that rebuilds a branch model in one `model.safetensors`.

Or in the Hub's layout, a folder.

No pickle is ever read for weights. Writes are atomic: a kill at any moment leaves the old file or
the new one.
"""

import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from timm_branches.arguments import shown
from timm_branches.description import check_arguments, check_tensors, read_object
from timm_branches.files import atomic_write
from timm_branches.heads import check_registered
from timm_branches.model import BranchModel
from timm_branches.model_card import model_card
from timm_branches.taxonomy import Taxonomy
from timm_branches.taxonomy.matching import match_taxonomies
from timm_branches.tensor_files import digest_tensors, parse_json, read_tensors, save_tensors

__all__ = [
    "card_of",
    "describe_model",
    "digest_tensors",
    "digest_weights",
    "file_taxonomy",
    "fill_model",
    "in_order_of",
    "load_weights",
    "read_metadata",
    "read_weights",
    "save_model",
    "save_pretrained",
]

_logger = logging.getLogger(__name__)

_FORMAT = "timm_branches"
_VERSION = 1
_PREPROCESSING = (
    "input_size",
    "interpolation",
    "crop_pct",
    "crop_mode",
    "mean",
    "std",
    "value_range",
    "raw_inputs",
)


def save_model(model: BranchModel, path: "str | os.PathLike", extra: dict | None = None) -> Path:
    """Write a model to one safetensors file with everything needed to rebuild it.

    Args:
        model: Made by `create_branch_model`.
        path: File to write, by convention `model.safetensors`.
        extra: JSON-safe facts to keep with it (results, the command that trained it).

    Returns:
        The path written.

    Raises:
        ValueError: The model was made with an option that JSON cannot hold (a class or a function),
            or so was `extra`.

    Example:
        >>> path = save_model(model, 'output/model.safetensors')   # doctest: +SKIP
        >>> model = load_model(path)                               # doctest: +SKIP
    """
    path = Path(path)
    tensors, tied = _tensors(model)
    metadata = {
        "producer": _FORMAT,
        "version": str(_VERSION),
        "config": json.dumps(describe_model(model)),
        "tied": json.dumps(tied),
        "extra": _as_json("extra=", model.extra if extra is None else extra),
    }
    if model.data_summary is not None:
        metadata["data_summary"] = json.dumps(model.data_summary)
    calibration = model.calibration
    if calibration is not None and calibration.get("weights") != digest_tensors(tensors, {}):
        _logger.warning(
            "The model has been trained or changed since it was calibrated: %s is written without "
            "its calibration. Calibrate it again.",
            path,
        )
        calibration = None
    if calibration is not None:
        metadata["calibration"] = _as_json("model.calibration", calibration)
    save_tensors(path, tensors, metadata)
    return path


def save_pretrained(
    model: BranchModel,
    folder: "str | os.PathLike",
    extra: dict | None = None,
    table: str | None = None,
    license: str | None = None,
) -> Path:
    """Write a folder in the Hugging Face Hub's layout.

    `config.json`, `model.safetensors` and, unless there is one, the card `README.md`.
    `model.push_to_hub('user/name')` puts such a folder on the Hub, `load_model('hf-hub:user/name')`
    and `BranchModel.from_pretrained('user/name')` read it there.

    Args:
        model: Made by `create_branch_model`.
        folder: It is made.
        extra: As in :func:`save_model`.
        table: Results for the card, in Markdown or as plain text.
        license: The model's licence by the Hub's name (`'mit'`, `'cc-by-4.0'`), for the card.

    Returns:
        The folder.

    Raises:
        ValueError: The model cannot be saved.
    """
    folder = Path(folder)
    description, card = describe_model(model), card_of(model, table, license)
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, folder / "model.safetensors", extra)
    text = json.dumps({"library_name": _FORMAT, **description}, indent=2) + "\n"
    atomic_write(folder / "config.json", text.encode())
    readme = folder / "README.md"
    if not readme.exists():
        atomic_write(readme, card.encode())
    elif table is not None or license is not None:
        warnings.warn(
            f"{readme} is there already and stays as it is, without the table or licence given: "
            "remove it for a new one.",
            stacklevel=2,
        )
    return folder


def digest_weights(model: BranchModel) -> str:
    """A checksum of all tensors that a model's file holds."""
    return digest_tensors(_tensors(model)[0], {})


def card_of(model: BranchModel, table: str | None = None, license: str | None = None) -> str:
    """The card of a model, see :func:`save_pretrained`."""
    return model_card(describe_model(model), table, license)


def load_weights(model: BranchModel, path: "str | os.PathLike") -> None:
    """Load a file's weights into a model that is built like it.

    The model changes only if everything fits. Classes are compared by name: if both have a tree,
    and the file's has the same classes in another order, the last layers' rows are put into the
    model's order.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A damaged or foreign file, missing or unexpected tensors, other shapes, or
            classes of other names.
    """
    metadata, tensors = read_weights(path)
    saved = file_taxonomy(metadata, path)
    fill_model(model, in_order_of(model, tensors, saved, path), path)


def file_taxonomy(metadata: dict[str, str], path: "str | os.PathLike") -> Taxonomy | None:
    """The tree of the model in a file, if it has one.

    Raises:
        ValueError: The file does not say how its model is built.
    """
    try:
        config = read_object(metadata.get("config"), "the description")
        described = check_arguments(config.get("model")).get("taxonomy")
        return None if described is None else Taxonomy.from_dict(described)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} does not say how its model is built, or says it wrongly: {error}"
        ) from error


def in_order_of(
    model: BranchModel,
    tensors: dict[str, torch.Tensor],
    saved: Taxonomy | None,
    path: "str | os.PathLike",
) -> dict[str, torch.Tensor]:
    """A file's tensors with the rows of the last layers in the order of the model's classes.

    Raises:
        ValueError: The file's tree has other classes than the model's.
    """
    if saved is None or model.taxonomy is None:
        return tensors
    translation = match_taxonomies(
        saved,
        model.taxonomy,
        given_name=f"the file {path}",
        expected_name="the model",
        subset=False,
    )
    if translation is None:
        return tensors
    result = dict(tensors)
    for name, (_, table) in zip(model.names, translation.tables, strict=False):
        rows = table[:-1].argsort()  # for each class of the model its row in the file
        if torch.equal(rows, torch.arange(len(rows))):
            continue
        if not isinstance(model.head(name).fc, nn.Linear):
            raise ValueError(
                f"{path} has the classes of {name!r} in another order than the model, and the last "
                "layer of that head is no Linear, whose rows could be reordered: make the model "
                "with the file's own tree."
            )
        for part in ("weight", "bias"):
            key = f"{model.head_prefix(name)}.fc.{part}"
            if key in result and len(result[key]) == len(rows):
                result[key] = result[key][rows]
    return result


def fill_model(
    model: BranchModel, tensors: dict[str, torch.Tensor], path: "str | os.PathLike"
) -> None:
    """Put tensors into a model, in their own floating-point types, if all of them fit."""
    check_tensors(model, tensors, path)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        # what was saved in bf16 comes back in bf16
        if name in tensors and tensors[name].dtype != tensor.dtype:
            tensor.data = tensor.data.to(tensors[name].dtype)
    model.load_state_dict(tensors, strict=True)


def read_metadata(path: "str | os.PathLike") -> dict[str, str] | None:
    """What a file says of itself; None for a safetensors file of another producer.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not a whole safetensors file, one that does not hold what was saved, or one of a
            later version of timm_branches.
    """
    return read_tensors(path, _FORMAT, _VERSION)[0]


def _tensors(model: BranchModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Contiguous copies of all tensors, each shared one once.

    And which names are aliases of which.
    """
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple, str] = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach()
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and key in first:
            tied[name] = first[key]
            continue
        first[key] = name
        tensor = tensor.cpu().contiguous()
        # a view must not drag its neighbours' storage into the file
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        tensors[name] = tensor if whole else tensor.clone()
    return tensors, tied


def read_weights(path: "str | os.PathLike") -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors, aliases included, of a file whose checksum is right."""
    if _is_pickled(path):
        raise ValueError(
            f"{path} was written by torch.save (or timm's CheckpointSaver, or Lightning): it has "
            "tensors, but does not say how its model is built. Build the model as it was built "
            "then: create_branch_model(..., checkpoint_path=) loads the file."
        )
    metadata, tensors = read_tensors(path, _FORMAT, _VERSION)
    if metadata is None:
        raise ValueError(
            f"{path} is a safetensors file but not one of timm_branches (it does not say how its "
            "model is built). Plain timm weights, and what accelerate and Trainer write, go into "
            "create_branch_model(..., checkpoint_path=)."
        )
    return metadata, tensors | _aliases(metadata, tensors, path)


def _is_pickled(path: "str | os.PathLike") -> bool:
    """Whether a file begins as those of torch.save do, of today or of before 2020."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(4).startswith((b"PK\x03\x04", b"\x80\x02"))


def _aliases(
    metadata: dict[str, str], tensors: dict[str, torch.Tensor], path: "str | os.PathLike"
) -> dict[str, torch.Tensor]:
    """Tensors that are in the file under another name."""
    try:
        tied = parse_json(metadata["tied"])
        return {alias: tensors[name] for alias, name in tied.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} says wrongly which of its tensors have several names: {error!r}."
        ) from error


def _as_json(name: str, value: Any) -> str:
    if not isinstance(value, dict):
        raise ValueError(f"{name} takes a dict that JSON can hold, got {shown(value)}.")
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} takes what JSON can hold: {error}.") from error


def describe_model(model: BranchModel) -> dict:
    """What rebuilds a model and prepares its images, JSON-safe, as its file keeps it.

    Raises:
        ValueError: It was made with an option that JSON cannot hold.
    """
    arguments = model.config.to_dict()
    for head in arguments.get("head", ()):
        check_registered(head)
    for key, value in arguments.items():
        try:
            json.dumps(value)
        except TypeError:
            raise ValueError(
                f"the model was made with {key}={value!r}, which a file cannot hold: use a name "
                "that timm knows (a string or a number) instead."
            ) from None
    cfg = {k: model.pretrained_cfg[k] for k in _PREPROCESSING if k in model.pretrained_cfg}
    return {"model": arguments, "pretrained_cfg": cfg}
