"""What a frozen backbone says of a data set, computed once and kept on the disk."""

import lazy_loader

# the names and where they live stand in __init__.pyi, which type checkers read, too
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
