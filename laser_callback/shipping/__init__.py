"""From a finding to a shipped model: gates, rollout, cleanup, export, and the way back.

What is written is whole or absent, and says where it comes from.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
