"""What is attached at a tap.

A head is described by a small frozen object that builds the module; `base` holds the contract.
"""

from timm_branches.heads.attention import AttentionHead, TransformerHead
from timm_branches.heads.base import (
    HEADS,
    Head,
    HeadModule,
    State,
    TemporalHead,
    check_module,
    check_registered,
    head_to_dict,
    parse_head,
    register_head,
)
from timm_branches.heads.classifier import BranchClassifier, FlattenHead, PoolHead
from timm_branches.heads.clip import ClipClassifier, MeanHead
from timm_branches.heads.decoder import RedNetHead, SkipDecoder, UNetHead
from timm_branches.heads.dense import (
    DPTHead,
    FPNHead,
    LeanHead,
    LinearHead,
    MapDecoder,
    SegformerHead,
    UPerNetHead,
)
from timm_branches.heads.folding import Clips
from timm_branches.heads.tcn import TCNHead
from timm_branches.heads.temporal import GRUHead, LSTMHead, MinGRUHead, TemporalClassifier

__all__ = [
    "AttentionHead",
    "BranchClassifier",
    "ClipClassifier",
    "Clips",
    "DPTHead",
    "FPNHead",
    "FlattenHead",
    "GRUHead",
    "HEADS",
    "Head",
    "HeadModule",
    "LSTMHead",
    "LeanHead",
    "LinearHead",
    "MapDecoder",
    "MeanHead",
    "MinGRUHead",
    "PoolHead",
    "RedNetHead",
    "SegformerHead",
    "SkipDecoder",
    "State",
    "TCNHead",
    "TemporalClassifier",
    "TemporalHead",
    "TransformerHead",
    "UNetHead",
    "UPerNetHead",
    "check_module",
    "check_registered",
    "head_to_dict",
    "parse_head",
    "register_head",
]
