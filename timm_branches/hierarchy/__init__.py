"""Label hierarchies: the tree of classes, ready-made and derived trees, and accuracy on a tree."""
from .decode import DECODERS, Prediction, back_off, decode, leaf_log_probs
from .derive import class_prototypes, cut_linkage, linkage_from_confusion, linkage_from_embeddings
from .evaluator import HierarchyEvaluator
from .metrics import consistency, full_path_accuracy, level_accuracy, sum_upwards
from .taxonomy import Taxonomy
from .trees import TREES, cifar10, cifar100, digits, fashion_mnist, get_taxonomy, mnist

__all__ = [
    "DECODERS",
    "TREES",
    "HierarchyEvaluator",
    "Prediction",
    "Taxonomy",
    "back_off",
    "cifar10",
    "cifar100",
    "class_prototypes",
    "consistency",
    "cut_linkage",
    "decode",
    "digits",
    "fashion_mnist",
    "full_path_accuracy",
    "get_taxonomy",
    "leaf_log_probs",
    "level_accuracy",
    "linkage_from_confusion",
    "linkage_from_embeddings",
    "mnist",
    "sum_upwards",
]
