"""Two models in one loop: the callback, the module, and what keeps the two apart.

The one room that knows Lightning's loops. A user's own results are what they are without it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
