"""What is installed, for the few expectations that older versions miss by a rounding or by a name."""

from __future__ import annotations

import lightning
import torch
import transformers
from packaging.version import Version

LIGHTNING = Version(lightning.__version__)
TORCH = Version(torch.__version__)
TRANSFORMERS = Version(transformers.__version__)
EXACT = Version("2.7") <= TORCH
"""Whether torch is new enough for the bounds as they are meant; 2.6 was measured to miss them."""
