"""What any tool of this kind needs: files, processes, progress, models of transformers and PEFT.

Knows the disk, the terminal, other processes, and foreign models as they come. Knows nothing of cuts, examples or
statistics, and imports no other room.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
