"""Two passes over one batch: what one of them writes, the other does not see.

Knows no plans of a comparison and no results; what an evaluation can reach is found, kept apart, and put back.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
