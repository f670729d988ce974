"""The command line: each command a typed function of the rooms below.

The only room that prints on its own account and knows exit codes. Nothing imports it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
