"""How to cut: one matrix, its singular values, its truncation; once, in memory and on disk.

Takes tensors and gives tensors. Changes no model, and does not know what a cut is for.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
