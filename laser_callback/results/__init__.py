"""What was found, as data: read, written and sent, and never computed here anew.

Plain values with ``to_dict`` and ``from_dict``. Does not know how they are shown, nor who found them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
