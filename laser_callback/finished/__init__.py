"""Finished runs: what models have answered, read from logs, and two of them compared as pairs.

Knows the logs of other programs, and no model: no torch is imported, but where the original is run again.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
