"""`create_branch_model`.

The one call that makes a branch model, in the manner of `timm.create_model`.
"""

import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from timm.models import create_model, load_model_config_from_hf, parse_model_name
from timm.models._hub import load_model_config_from_path
from torch import nn

import timm_branches.backbones  # noqa: F401  (registers the papers' networks)
from timm_branches.arguments import as_items, check_flag, check_number
from timm_branches.description import (
    check_arguments,
    check_computed_size,
    check_preprocessing,
    check_size,
    check_tensors,
    limited,
    read_object,
)
from timm_branches.heads import HEADS, Head, head_to_dict, parse_head
from timm_branches.model import BranchModel, ModelConfig, answers_all_levels, module_key
from timm_branches.state_dicts import Checkpoint, read_state
from timm_branches.taps.notation import Tap, check_name
from timm_branches.taxonomy import Taxonomy, get_taxonomy
from timm_branches.weights import (
    card_of,
    file_taxonomy,
    fill_model,
    in_order_of,
    read_metadata,
    read_weights,
    save_pretrained,
)

__all__ = ["create_branch_model", "load_model"]

# what timm's models take but a branch model cannot honour, and what to do instead
_REFUSED = {
    "features_only": "it is a branch model; model.forward_taps(x) gives the maps at the taps",
    "out_indices": "choose taps=",
    "feature_cls": "taps are read with forward_intermediates",
    "global_pool": "the backbone's classifier is removed; choose the heads' pooling with "
    "PoolHead(pool_type=...)",
    "out_map": "choose names=",
}

_MOST_CLASSES = 2**24  # a linear layer on 2,048 features has 137 GB then

# where weights come from
_SOURCES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source")


def create_branch_model(
    model_name: str,
    taps: Sequence[int | str | Tap | Sequence[int | str | Tap]] | int | str | Tap = (5,),
    num_classes: int | Sequence[int | None] | None = None,
    head: str | Head | Sequence[str | Head] = "pool",
    names: Sequence[str] | None = None,
    taxonomy: Taxonomy | str | os.PathLike | Sequence[Any] | None = None,
    pretrained: bool = False,
    in_chans: int | None = None,
    img_size: int | Sequence[int] | None = None,
    drop_rate: float | None = None,
    checkpoint_path: str | os.PathLike = "",
    **kwargs: Any,
) -> BranchModel:
    """A timm backbone with a head at each tap.

    Args:
        model_name: Any name that `timm.create_model` takes, weight tags and `hf-hub:` included.
        taps: Where the heads listen: stage numbers (5 is the last), `'conv3'`, module paths,
            `Tap(...)`. One per head; a head that reads several (a decoder) takes a tuple of them,
            or, if it is the only head, all.
        num_classes: Classes of each head, or one number for all. None: the taxonomy's, else the
            backbone's own.
        head: A kind (`'pool'`, `'flatten'`; `'lstm'`, `'gru'` for clips), a Head object, or
            one of these per tap.
        names: Names of the heads. By default the taxonomy's levels, else `stageK`, a decoder's
            kind.
        taxonomy: Label hierarchy, one level a head from coarse to fine; saved with the model. Also
            what :func:`get_taxonomy` takes (`'cifar10'`, a file), or the leaves' paths. Heads
            after those of the levels are free. A decoder that is the only head answers for all
            levels, each under its name.
        pretrained: Load timm's weights into the backbone.
        in_chans: Channels of the images, by default the backbone's own.
        img_size: Height and width of the images. Backbones bound to one size are built for it; for
            others it only sizes `'flatten'` heads and the preprocessing.
        drop_rate: Dropout of the backbone, where it has some, and of heads that do not set their
            own.
        checkpoint_path: A timm checkpoint for the backbone, or a branch model's own, by whatever it
            was written: `save_model`, `torch.save`, timm's CheckpointSaver, accelerate, Trainer,
            Lightning. All that fits is loaded, what is left out is said in a warning. Heads of
            other classes than the file's start anew; a backbone that does not fit is refused.
        **kwargs: Whatever else the backbone takes (`drop_path_rate`, `output_stride`,
            `scriptable`, ...).

    Returns:
        A :class:`BranchModel`; what `model(images)` gives is logits by name, in tap order.

    Raises:
        ValueError: An unknown model, tap, head or option, counts that do not fit each other, or a
            checkpoint of another backbone.

    Example:
        >>> model = create_branch_model('resnet18', taps=[3, 4, 5], num_classes=[2, 7, 25])
        >>> {k: tuple(v.shape) for k, v in model(torch.randn(2, 3, 64, 64)).items()}
        {'stage3': (2, 2), 'stage4': (2, 7), 'stage5': (2, 25)}
    """
    taxonomy = _check_arguments(
        model_name, taxonomy, pretrained, in_chans, img_size, drop_rate, checkpoint_path
    )
    for key, why in _REFUSED.items():
        if kwargs.get(key) is not None and kwargs[key] is not False:
            raise ValueError(f"create_branch_model does not take {key}=: {why}.")
    for key, value in kwargs.items():
        # timm's own rates: beyond these a network trains on nothing, or not at all
        if value is not None and key.endswith("_rate"):
            check_number(f"{key}=", value, 0, 1, below=True)
        check_size(f"{key}=", value)
    groups, heads = _heads_at_taps(taps, head)
    head_names = _names(names, taxonomy, groups, heads)

    size = None
    if img_size is not None:
        size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
    backbone = _create_backbone(model_name, pretrained, in_chans, size, drop_rate, kwargs)
    shared = answers_all_levels(heads, taxonomy)
    classes = _classes(num_classes, taxonomy, backbone, head_names, shared)
    nominal = _input_size(backbone, size, in_chans)
    # before the model, which prunes the backbone: a checkpoint has all of it
    checkpoint = None
    if checkpoint_path:
        checkpoint = _read_checkpoint(os.fspath(checkpoint_path), backbone)
    model = BranchModel(backbone, groups, heads, classes, head_names, nominal, drop_rate, taxonomy)

    model_name, kwargs = _without_source(model_name, kwargs)
    if size is None:
        size = kwargs.pop("img_size", None)
    model.config = ModelConfig(
        model_name=model_name,
        taps=list(map(_group_to_dict, groups)),
        num_classes=list(classes),
        head=list(map(head_to_dict, heads)),
        names=list(head_names),
        taxonomy=taxonomy,
        in_chans=nominal[0],
        img_size=list(size) if isinstance(size, (list, tuple)) else size,
        drop_rate=drop_rate,
        **kwargs,
    )
    if checkpoint is not None:
        _load_checkpoint(model, checkpoint)
    return model


def _check_arguments(
    model_name: Any,
    taxonomy: Any,
    pretrained: Any,
    in_chans: Any,
    img_size: Any,
    drop_rate: Any,
    checkpoint_path: Any,
) -> Taxonomy | None:
    """Refuse what is no such argument; the taxonomy, read if it was named."""
    check_name(model_name)
    check_flag("pretrained=", pretrained)
    if in_chans is not None:
        check_number("in_chans=", in_chans, 1, 65_536, whole=True)
    if drop_rate is not None:
        check_number("drop_rate=", drop_rate, 0, 1, below=True)
    if img_size is not None:
        sides = [img_size]
        if not isinstance(img_size, int):
            sides = as_items("img_size=", img_size, "(224, 224)")
            if len(sides) != 2:
                raise ValueError(f"img_size= takes a side or (height, width), got {img_size!r}.")
        for side in sides:
            check_number("img_size=", side, 1, 65_536, whole=True)
    if not isinstance(checkpoint_path, (str, os.PathLike)):
        raise ValueError(f"checkpoint_path= takes a path, got {checkpoint_path!r}.")
    if taxonomy is None or isinstance(taxonomy, Taxonomy):
        return taxonomy
    if isinstance(taxonomy, (str, os.PathLike)):
        return get_taxonomy(os.fspath(taxonomy))
    return Taxonomy(as_items("taxonomy=", taxonomy, "['animal/cat', 'animal/dog']"))


def _heads_at_taps(taps: Any, head: Any) -> tuple[list[list[Tap]], list[Head]]:
    """For each head its taps, and the heads."""
    groups = _parse_taps(taps)
    if not isinstance(head, (list, tuple)):
        single_taps = all(len(group) == 1 for group in groups)
        if parse_head(head).multi_tap and single_taps:
            # the only head reads all taps
            groups = [list(chain.from_iterable(groups))]
    heads = [parse_head(spec) for spec in _one_per_head(head, len(groups), "head")]
    for spec, group in zip(heads, groups, strict=True):
        if len(group) > 1 and not spec.multi_tap:
            tap_names = [tap.name for tap in group]
            raise ValueError(f"head {spec.kind!r} reads one tap, got {tap_names}: give it one.")
    return groups, heads


def _parse_taps(taps: Any) -> list[list[Tap]]:
    """For each head its taps."""
    single = (int, str, Tap, dict)
    entries = [taps] if isinstance(taps, single) else as_items("taps=", taps, "[3, 4, 5]")
    groups = []
    for entry in entries:
        group: Any = entry
        if isinstance(entry, single):
            group = [entry]
        elif not isinstance(entry, (list, tuple)):
            raise ValueError(
                f"taps= takes stage numbers, names, module paths or Taps, got {entry!r} among "
                f"{taps!r}."
            )
        groups.append([Tap.parse(tap) for tap in group])
    if not groups or not all(groups):
        raise ValueError("taps= is empty: name at least one, such as taps=[3, 4, 5].")
    return groups


def _group_to_dict(group: Sequence[Tap]) -> Any:
    """JSON-safe form of a head's taps, as `taps=` takes it.

    Always a list when there are several.
    """
    if len(group) == 1:
        return group[0].to_dict()
    return [tap.to_dict() for tap in group]


def _one_per_head(value: Any, count: int, what: str) -> list:
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        raise ValueError(
            f"{len(values)} entries in {what}= for {count} taps: give one for all or one per tap."
        )
    return values


def _names(
    names: Sequence[str] | None,
    taxonomy: Taxonomy | None,
    groups: Sequence[Sequence[Tap]],
    heads: Sequence[Head],
) -> list[str]:
    """The heads' names: those given, else the taxonomy's levels, else those of taps and kinds."""
    shared = answers_all_levels(heads, taxonomy)
    levels: list[str] = []
    if taxonomy is not None and not shared:
        levels = list(taxonomy.levels)
    if len(levels) > len(groups):
        raise ValueError(
            f"the taxonomy has {len(levels)} levels {levels} for {len(groups)} taps: give one tap "
            "per level, from coarse to fine."
        )
    if names is not None:
        result = as_items("names=", names, "['coarse', 'fine']")
        if not all(isinstance(name, str) for name in result):
            raise ValueError(f"names= takes texts, got {result!r}.")
    else:
        result = levels
        for head, group in list(zip(heads, groups, strict=True))[len(levels) :]:
            result.append(head.kind if head.multi_tap else group[0].name)
    if len(result) != len(groups):
        raise ValueError(f"{len(result)} names {result} for {len(groups)} taps.")
    keys = {module_key(name) for name in result}
    if len(keys) != len(result) or not all(result):
        raise ValueError(
            f"the heads' names must differ and not be empty, got {result}: give names=[...]."
        )
    return result


def _classes(
    num_classes: Any,
    taxonomy: Taxonomy | None,
    backbone: nn.Module,
    names: Sequence[str],
    shared: bool,
) -> list[int]:
    """Classes of each head; those of the taxonomy's levels must be the taxonomy's."""
    of_levels = list(taxonomy.num_classes) if taxonomy is not None else []
    if shared:
        of_levels = [sum(of_levels)]
    if num_classes is None:
        return _default_classes(of_levels, backbone, names)
    classes = _one_per_head(num_classes, len(names), "num_classes")
    for position, level_classes in enumerate(of_levels):
        if classes[position] is None:
            classes[position] = level_classes
    for count in classes:
        whole = isinstance(count, int) and not isinstance(count, bool)
        if not whole or not 0 <= count <= _MOST_CLASSES:
            raise ValueError(
                f"num_classes= takes whole numbers from 0 to {_MOST_CLASSES:,}, got "
                f"{num_classes!r}."
            )
    if classes[: len(of_levels)] != of_levels:
        raise ValueError(
            f"num_classes={classes} does not fit the taxonomy's {of_levels}: leave num_classes out."
        )
    return classes


def _default_classes(of_levels: list[int], backbone: nn.Module, names: Sequence[str]) -> list[int]:
    """The taxonomy's classes, without a taxonomy the backbone's own for every head."""
    if of_levels:
        free = list(names[len(of_levels) :])
        if free:
            example = [None] * len(of_levels) + ["..."] * len(free)
            raise ValueError(
                f"the taxonomy names the classes of {len(of_levels)} heads, but not of {free}: "
                f"give num_classes={example} with theirs."
            )
        return of_levels
    own = int(getattr(backbone, "pretrained_cfg", {}).get("num_classes") or 0)
    if own < 1:
        raise ValueError(
            "this backbone has no classes of its own (it was trained for features): "
            "give num_classes=."
        )
    return [own] * len(names)


def _create_backbone(
    name: str,
    pretrained: bool,
    in_chans: int | None,
    size: tuple[int, int] | None,
    drop_rate: float | None,
    kwargs: dict,
) -> nn.Module:
    options = dict(kwargs, in_chans=in_chans, drop_rate=drop_rate, num_classes=0)
    if size is not None:
        try:
            return create_model(name, pretrained=pretrained, img_size=size, **options)
        except TypeError as error:  # fully convolutional: takes every size, hence no such argument
            if "img_size" not in str(error):
                raise _bad_option(name, error, kwargs) from error
    try:
        return create_model(name, pretrained=pretrained, **options)
    # what timm's code runs into when an option means nothing to it
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        NotImplementedError,
        TypeError,
    ) as error:
        raise _bad_option(name, error, kwargs) from error


def _bad_option(name: str, error: Exception, options: dict) -> Exception:
    if "unexpected keyword argument" in str(error):
        return ValueError(f"{name} does not take an option given to create_branch_model: {error}.")
    if not options:
        return error
    given = ", ".join(f"{key}={value!r}" for key, value in options.items())
    reason = str(error) or "it stopped at a check of its own"
    return ValueError(f"timm cannot make {name} with {given}: {reason} ({type(error).__name__}).")


def _input_size(
    backbone: nn.Module, size: tuple[int, int] | None, in_chans: int | None
) -> tuple[int, int, int]:
    own = (getattr(backbone, "pretrained_cfg", None) or {}).get("input_size") or (3, 224, 224)
    height, width = size or own[-2:]
    return int(in_chans or getattr(backbone, "in_chans", None) or own[0]), int(height), int(width)


def _is_ours(path: str | os.PathLike) -> bool:
    if not path or not str(path).endswith(".safetensors"):
        return False
    return read_metadata(path) is not None


def _without_source(name: str, kwargs: dict) -> tuple[str, dict]:
    """The same backbone without the Hub or folder it came from, for files.

    They bring their own weights.
    """
    kwargs = {k: v for k, v in kwargs.items() if k not in ("cache_dir", "device", "dtype")}
    for key in ("pretrained_cfg", "pretrained_cfg_overlay"):
        if isinstance(kwargs.get(key), dict):
            # what else it changed still holds
            config = {k: v for k, v in kwargs.pop(key).items() if k not in _SOURCES}
            if config:
                kwargs[key] = config
    source, place = parse_model_name(name)
    if source is None:
        return name, kwargs
    read = load_model_config_from_hf if source == "hf-hub" else load_model_config_from_path
    _, name, arguments = read(place)
    ours = ("num_classes", "in_chans", "drop_rate", "global_pool")
    return name, {**{k: v for k, v in (arguments or {}).items() if k not in ours}, **kwargs}


def _read_checkpoint(path: str, backbone: nn.Module) -> Checkpoint | None:
    """What a checkpoint has for a whole backbone and for heads; a JAX archive is loaded at once."""
    if path.lower().endswith((".npz", ".npy")):
        if not os.path.isfile(path):
            raise FileNotFoundError(f"checkpoint_path={path!r}: there is no such file.")
        backbone.load_pretrained(path)  # type: ignore[operator]
        return None
    if not _is_ours(path):
        return Checkpoint(read_state(path), backbone, path)
    metadata, tensors = read_weights(path)
    return Checkpoint(tensors, backbone, path, file_taxonomy(metadata, path))


def _load_checkpoint(model: BranchModel, checkpoint: Checkpoint) -> None:
    """Fill a model with all that fits; one of our files says which classes its heads know."""
    renamed: tuple[str, ...] = ()
    why = ""
    path, saved = checkpoint.path, checkpoint.taxonomy
    try:
        checkpoint.of_heads = in_order_of(model, checkpoint.of_heads, saved, path)
    except ValueError as difference:
        renamed, why = model.level_heads, str(difference)
    checkpoint.load_backbone(model.backbone, model.in_chans)
    checkpoint.load_heads(model, renamed, why)


def load_model(path: str | os.PathLike, map_location: str | torch.device = "cpu") -> BranchModel:
    """Rebuild a model from its file, or from a folder in the Hub's layout, in eval mode.

    Args:
        path: A file that :func:`save_model` wrote, a folder that :func:`save_pretrained` wrote, or
            `'hf-hub:user/name'` (`@revision` behind it if wanted) for such a folder on the
            Hugging Face Hub.
        map_location: Device to put the model on.

    Raises:
        FileNotFoundError: Nothing there.
        ValueError: A damaged or foreign file, or weights that do not fit its own description.
    """
    if str(path).startswith("hf-hub:"):
        path = _download(str(path).removeprefix("hf-hub:"))
    path = Path(path)
    config_file = None
    if path.is_dir():
        path, config_file = path / "model.safetensors", path / "config.json"
    metadata, tensors = read_weights(path)
    source, text = path, metadata.get("config")
    if config_file is not None and config_file.exists():
        source = config_file
    try:
        if source is config_file:
            text = source.read_text(encoding="utf-8")
        config = read_object(text, "the description")
        arguments = check_arguments(config.get("model"))
        summary = read_object(metadata.get("data_summary", "{}"), "the summary of the data")
        extra = read_object(metadata.get("extra", "{}"), "what it keeps beside the model")
        calibration = read_object(metadata.get("calibration", "{}"), "its calibration")
    except ValueError as error:
        raise _wrong_description(source, error) from error
    unknown = _unregistered(arguments["head"])
    if unknown is not None:
        raise ValueError(f"{source} cannot be loaded yet. {unknown}")
    try:
        if arguments.get("taxonomy") is not None:
            arguments["taxonomy"] = Taxonomy.from_dict(arguments["taxonomy"])
        with limited(len(tensors)):
            draft = create_branch_model(**arguments)
        preprocessing = check_preprocessing(config.get("pretrained_cfg"), draft.in_chans)
    except Exception as error:  # the description of a stranger can end anywhere in timm's code
        raise _wrong_description(source, error) from error
    check_tensors(draft, tensors, path)
    check_computed_size(draft, tensors, path)
    model = create_branch_model(**arguments)
    model.pretrained_cfg.update(preprocessing)
    fill_model(model, tensors, path)
    model.data_summary = summary or None
    model.extra = extra
    model.calibration = calibration or None
    return model.to(map_location).eval()


def _wrong_description(source: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{source} does not say how its model is built, or says it wrongly: "
        f"{error if isinstance(error, ValueError) else repr(error)}"
    )


def _unregistered(heads: Any) -> ValueError | None:
    """What is missing if one of a file's heads comes from outside and is not registered here."""
    for head in heads or ():
        if isinstance(head, dict) and "module" in head and head.get("kind") not in HEADS:
            try:
                parse_head(head)
            except ValueError as error:
                return error
    return None


def _download(repository: str, **options: Any) -> str:
    """Fetch a model's two files from the Hub; returns the folder they lie in."""
    from huggingface_hub import snapshot_download

    name, _, revision = repository.partition("@")
    if revision:
        options["revision"] = revision
    return snapshot_download(name, allow_patterns=["config.json", "model.safetensors"], **options)


BranchModel.use_files(write=save_pretrained, read=load_model, download=_download, card=card_of)
