"""What dense outputs (segmentation, restoration) need beside a decoder head.

Losses, metrics, inference in tiles.

Names are imported when they are first used, as in :mod:`timm_branches.data`.
"""

import lazy_loader

# the names and where they live stand in __init__.pyi, which type checkers read, too
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
