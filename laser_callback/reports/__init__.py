"""How results are shown: in the terminal, as a page, as pictures, to loggers, on a model card.

Reads results and changes none; runs no model. Text that came from users stays text everywhere.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
