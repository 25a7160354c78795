"""Branch classifiers, temporal heads and skip decoders on any timm backbone."""

from timm_branches.factory import create_branch_model, load_model
from timm_branches.heads import (
    AttentionHead,
    BranchClassifier,
    DPTHead,
    FlattenHead,
    FPNHead,
    GRUHead,
    Head,
    LeanHead,
    LinearHead,
    LSTMHead,
    MeanHead,
    MinGRUHead,
    PoolHead,
    RedNetHead,
    SegformerHead,
    TCNHead,
    TransformerHead,
    UNetHead,
    UPerNetHead,
    register_head,
)
from timm_branches.inference import StreamingClassifier, StreamingStep, detach_state
from timm_branches.model import BranchModel
from timm_branches.taps import Tap, list_taps
from timm_branches.taxonomy import Taxonomy
from timm_branches.weights import load_weights, save_model, save_pretrained

__version__ = "0.1.0"

__all__ = [
    "AttentionHead",
    "BranchClassifier",
    "BranchModel",
    "DPTHead",
    "FPNHead",
    "FlattenHead",
    "GRUHead",
    "Head",
    "LSTMHead",
    "LeanHead",
    "LinearHead",
    "MeanHead",
    "MinGRUHead",
    "PoolHead",
    "RedNetHead",
    "SegformerHead",
    "StreamingClassifier",
    "StreamingStep",
    "TCNHead",
    "Tap",
    "Taxonomy",
    "TransformerHead",
    "UNetHead",
    "UPerNetHead",
    "create_branch_model",
    "detach_state",
    "list_taps",
    "load_model",
    "load_weights",
    "register_head",
    "save_model",
    "save_pretrained",
]
