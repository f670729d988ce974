from .compare import LaserCallback as LaserCallback
from .compare import LaserModule as LaserModule
from .data import FactsDataModule as FactsDataModule
from .data import ProbesDataModule as ProbesDataModule
from .plans import LaserPlan as LaserPlan
from .plans import Reduction as Reduction
from .plans import WeightMatrix as WeightMatrix
from .plans import find_matrices as find_matrices
from .search import LaserSearch as LaserSearch
from .shipping import LaserCleanup as LaserCleanup
from .shipping import StagedRollout as StagedRollout
from .shipping import load_factored as load_factored
from .shipping import restore as restore
from .shipping import save_reduced as save_reduced
from .spectra import BaseWeights as BaseWeights
from .spectra import Spectra as Spectra
from .stats import Outcomes as Outcomes
from .support import merged as merged
from .surgery import reduced as reduced

__version__: str
