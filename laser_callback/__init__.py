"""LASER (layer-selective rank reduction, arXiv 2312.13558) for PyTorch Lightning, with sound statistics.

Names are imported on first use: the command line's help must not wait for torch, Lightning and transformers.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
