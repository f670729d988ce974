from .recipe import CutMatrix as CutMatrix
from .recipe import Recipe as Recipe
from .record import apply as apply
from .record import recorded as recorded
from .replay import LayerReplay as LayerReplay
from .replay import ReplayReport as ReplayReport
from .swap import reduced as reduced
