"""What a model is asked: facts, running text, tasks and probes, and how answers are scored.

Knows tokens, batches and metrics. Does not know that anything is cut.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
