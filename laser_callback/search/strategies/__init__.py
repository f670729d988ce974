"""What proposes candidates to a search: plans, and of a race's leaders their neighbours.

A strategy reads the :class:`Context` of a step and changes nothing. Which candidates race, and in which order, is not
its business.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
