"""What to cut: the matrices of a model, and the plans that name them.

Reads a model's structure and never its values. Does not know how a matrix is cut, what is asked of the model, or what a
plan is good for.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
