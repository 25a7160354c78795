"""Models on the Hugging Face Hub: saved, loaded and pushed with the names that people know.

What a model's files are is told by `weights.py` and `factory.py`, which stand above the model; they
hand it in with `use_files`.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from huggingface_hub import HfApi, ModelCard, ModelHubMixin

__all__ = ["HubModel"]


class HubModel(ModelHubMixin):
    """The part of a branch model that goes to the Hub and comes from there.

    The Hub's own mixin pushes; how files are written and read is the same as with
    `save_pretrained` and `load_model`: strictly, and never from pickles.
    """

    # the mixin would keep the arguments of __init__: config.json says it all
    _hub_mixin_config = {}
    _write_files: ClassVar[Callable[..., Path]]
    _read_files: ClassVar[Callable[..., Any]]
    _fetch: ClassVar[Callable[..., str]]
    _card_text: ClassVar[Callable[..., str]]

    @classmethod
    def use_files(
        cls,
        write: Callable[..., Path],
        read: Callable[..., Any],
        download: Callable[..., str],
        card: Callable[..., str],
    ) -> None:
        """Say how a folder is written, read and downloaded, and what its card says."""
        cls._write_files, cls._read_files = staticmethod(write), staticmethod(read)
        cls._fetch, cls._card_text = staticmethod(download), staticmethod(card)

    def save_pretrained(
        self,
        save_directory: "str | os.PathLike",
        *,
        config: None = None,  # type: ignore[override]
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write a folder in the Hub's layout: `model.safetensors`, `config.json`, `README.md`.

        Args:
            save_directory: The folder; it is made. A `README.md` that is there stays as it is.
            config: Only None: the model says itself how it is built.
            repo_id: Where to push to, by default the folder's name.
            push_to_hub: Push it as well.
            model_card_kwargs: `table` and `license` of :func:`timm_branches.save_pretrained`.
            **push_to_hub_kwargs: As in :meth:`push_to_hub`.

        Returns:
            The commit if it was pushed, else None.

        Raises:
            ValueError: The model cannot be saved, or `config` or options without effect are given.

        Example:
            >>> model.save_pretrained('output/hub')                        # doctest: +SKIP
            >>> model = BranchModel.from_pretrained('output/hub')          # doctest: +SKIP
        """
        if config is not None:
            raise ValueError("config= has no effect: the model says itself how it is built.")
        if not push_to_hub and (push_to_hub_kwargs or repo_id is not None):
            unused = sorted([*push_to_hub_kwargs, *(["repo_id"] if repo_id is not None else [])])
            raise ValueError(f"{', '.join(unused)} have no effect without push_to_hub=True.")
        self._write_files(self, save_directory, **(model_card_kwargs or {}))
        if not push_to_hub:
            return None
        return self.push_to_hub(
            repo_id or Path(save_directory).name,
            model_card_kwargs=model_card_kwargs,
            **push_to_hub_kwargs,
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: "str | os.PathLike",
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: "str | os.PathLike | None" = None,
        local_files_only: bool = False,
        revision: str | None = None,
        map_location: str | torch.device = "cpu",
    ) -> Self:
        """Rebuild a model from a folder or from the Hub, in eval mode, as `load_model` does.

        Args:
            pretrained_model_name_or_path: A folder, a file, or `user/name` on the Hub.
            force_download: Download what is in the cache already.
            token: For private repositories; None takes the one that `hf auth login` left.
            cache_dir: Where downloads are kept.
            local_files_only: Take what is in the cache.
            revision: A branch, tag or commit.
            map_location: Device to put the model on.

        Raises:
            FileNotFoundError: The folder or repository has no `model.safetensors`.
            ValueError: A damaged or foreign file, or weights that do not fit its description.
        """
        place = os.fspath(pretrained_model_name_or_path)
        if not os.path.exists(place):
            place = cls._fetch(
                place.removeprefix("hf-hub:"),
                revision=revision,
                force_download=force_download,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        return cls._read_files(place, map_location)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | None = None,
        private: bool | None = None,
        branch: str | None = None,
        ignore_patterns: list[str] | str | None = None,
        model_card_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> str:
        """Put the model on the Hub, in one commit; the repository is made if there is none.

        Args:
            repo_id: `user/name`.
            token: With the right to write; None takes the one that `hf auth login` left.
            private: Of a new repository.
            branch: Where to commit, by default `main`.
            ignore_patterns: Files that are not pushed. A `README.md` that is there is never
                replaced.
            model_card_kwargs: As in :meth:`save_pretrained`.
            **options: The others of huggingface_hub's mixin (`commit_message`, `create_pr`, ...).

        Returns:
            The commit.

        Raises:
            ValueError: The model cannot be saved.
        """
        self.generate_model_card(**(model_card_kwargs or {}))  # what cannot be saved makes no repo
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        ignored = [ignore_patterns] if isinstance(ignore_patterns, str) else ignore_patterns or []
        if api.file_exists(repo_id, "README.md", revision=branch):
            ignored = [*ignored, "README.md"]
        return super().push_to_hub(
            repo_id,
            token=token,
            private=private,
            branch=branch,
            ignore_patterns=ignored or None,
            model_card_kwargs=model_card_kwargs,
            **options,
        )

    def generate_model_card(self, **model_card_kwargs: Any) -> ModelCard:
        """The card, as :meth:`save_pretrained` writes it."""
        return ModelCard(self._card_text(self, **model_card_kwargs))

    @property
    def _model_args(self) -> "_NotOfTimm":
        # timm notes here what its create_model was given; it is read when timm saves a model
        return _NotOfTimm()

    @_model_args.setter
    def _model_args(self, value: dict) -> None:
        pass


class _NotOfTimm(dict):
    """Refuses to be written by timm, whose repositories have no place for heads and tree."""

    def items(self):
        raise ValueError(
            "timm's save_for_hf and push_to_hf_hub cannot save a branch model: timm could not "
            "build it again. Use model.save_pretrained(folder) or model.push_to_hub('user/name')."
        )
