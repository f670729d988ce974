from .screen import GradientScreen as GradientScreen
from .search import LaserSearch as LaserSearch
from .search import OutOfTimeError as OutOfTimeError
