"""Label hierarchies: the tree of classes, ready-made trees, and accuracy on a tree."""
from .metrics import consistency, full_path_accuracy, level_accuracy, sum_upwards
from .taxonomy import Taxonomy
from .trees import TREES, cifar10, cifar100, digits, fashion_mnist, get_taxonomy, mnist

__all__ = [
    "TREES",
    "Taxonomy",
    "cifar10",
    "cifar100",
    "consistency",
    "digits",
    "fashion_mnist",
    "full_path_accuracy",
    "get_taxonomy",
    "level_accuracy",
    "mnist",
    "sum_upwards",
]
