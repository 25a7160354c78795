"""Datasets with labels on several levels, their transforms, loaders and mixup.

Names are imported when they are first used, so that importing this package is cheap: what is not
needed (albumentations, scikit-learn, torchvision's datasets, OpenCV) is never loaded.
"""

import lazy_loader

# the names and where they live stand in __init__.pyi, which type checkers read, too
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
