"""Put in and take out: the one room that changes weights, and that lets layers in front of a cut answer from a record.

Whatever happens inside of a block, the model is afterwards bit for bit what it was. Knows no data and no statistics.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
