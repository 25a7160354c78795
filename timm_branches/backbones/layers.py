"""What the plain networks here have in common.

Blocks one after another, each of which is a feature, and a head.
"""

from typing import Any

import torch
from timm.layers import get_device_dtype
from timm.models import checkpoint, checkpoint_seq
from timm.models._features import feature_take_indices
from torch import nn

__all__: list[str] = []


class BlockNet(nn.Module):
    """timm's interface for a network of blocks.

    A subclass makes blocks, head and the other attributes.

    Attributes:
        blocks: `nn.Sequential`, run one after another.
        feature_info: timm's description of each block's output.
        head: timm's `ClassifierHead`, or one that a subclass resets itself; its last Linear is
            `head.fc`.
        num_features: Channels of the last block.
        head_hidden_size: What goes into the last Linear.
        num_classes: Outputs, 0 without a classifier.
        drop_rate: Dropout before the classifier.

    Shape:
        - Input: (B, in_chans, H, W)
        - Output: (B, num_classes)
    """

    blocks: nn.Sequential
    feature_info: list[dict[str, Any]]
    head: Any
    num_features: int
    head_hidden_size: int
    num_classes: int
    drop_rate: float
    grad_checkpointing = False

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for layer decay: a block each."""
        return {"stem": r"^blocks\.0", "blocks": r"^blocks\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' outputs for the backward pass and compute the rest again."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last Linear, or Identity without classes."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the classifier other outputs, 0 for pooled features.

        None keeps the pooling there is.
        """
        self.num_classes = num_classes
        # the pruned head has no parameters that tell the device, the blocks always have
        self.head.reset(
            num_classes, global_pool, in_features=self.num_features, **get_device_dtype(self)
        )

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Maps of several blocks, each after its pool if it has one.

        Args:
            x: Images (B, C, H, W).
            indices: The last n blocks if int, all if None, else the blocks named by index.
            norm: Nothing here (there is no final norm), part of timm's signature.
            stop_early: Do not compute blocks deeper than the last one asked for.
            output_fmt: Only 'NCHW'.
            intermediates_only: Leave out the final features.

        Returns:
            (last map, list of maps), or the list alone if `intermediates_only`.

        Raises:
            ValueError: `output_fmt` is not 'NCHW'.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}.")
        take, deepest = feature_take_indices(len(self.feature_info), indices)
        intermediates = []
        for index, block in enumerate(self.blocks[: deepest + 1] if stop_early else self.blocks):
            x = (
                checkpoint(block, x)
                if self.grad_checkpointing and torch.is_grad_enabled()
                else block(x)
            )
            if index in take:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks below the deepest one asked for, and the classifier.

        Args:
            indices: Blocks to keep, as in :meth:`forward_intermediates`.
            prune_norm: Nothing here, part of timm's signature.
            prune_head: Drop the classifier. It goes in any case if its input does.

        Returns:
            Indices of the kept features.
        """
        take, deepest = feature_take_indices(len(self.feature_info), indices)
        shortened = deepest + 1 < len(self.blocks)
        if shortened:
            self.blocks = self.blocks[: deepest + 1]
            self._shortened_to(deepest)
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take

    def _shortened_to(self, deepest: int) -> None:
        """The block of that index is the last one from now on."""
        self.num_features = self.head_hidden_size = self.feature_info[deepest]["num_chs"]

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> the last block's map."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """The last block's map -> (B, num_classes).

        With `pre_logits`, what goes into the last Linear.
        """
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))
