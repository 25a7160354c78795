"""Branch classifiers, temporal heads and skip decoders on any timm backbone."""

from timm_branches.factory import create_branch_model, load_model
from timm_branches.heads import (
    AttentionHead,
    BranchClassifier,
    FlattenHead,
    GRUHead,
    Head,
    LSTMHead,
    MeanHead,
    MinGRUHead,
    PoolHead,
    RedNetHead,
    TCNHead,
    TransformerHead,
    UNetHead,
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
    "FlattenHead",
    "GRUHead",
    "Head",
    "LSTMHead",
    "MeanHead",
    "MinGRUHead",
    "PoolHead",
    "RedNetHead",
    "StreamingClassifier",
    "StreamingStep",
    "TCNHead",
    "Tap",
    "Taxonomy",
    "TransformerHead",
    "UNetHead",
    "create_branch_model",
    "detach_state",
    "list_taps",
    "load_model",
    "load_weights",
    "register_head",
    "save_model",
    "save_pretrained",
]
