"""Paired statistics: what was shown, and what was not.

Arrays of outcomes in, rows of plain numbers out. Needs NumPy and SciPy only and can be used alone: it knows no model,
no process and no torch, and imports no other room.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
