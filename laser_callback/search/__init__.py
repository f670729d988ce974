"""Which cut helps: screen, race, compose, confirm.

Chooses on some examples and claims on others. Measures by ``compare``, and puts nothing into a model for good.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
