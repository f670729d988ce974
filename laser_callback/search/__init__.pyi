from .budget import OutOfTimeError as OutOfTimeError
from .screen import GradientScreen as GradientScreen
from .search import LaserSearch as LaserSearch
from .sensitivities import Sensitivities as Sensitivities
from .sensitivities import View as View
from .testing import check_strategy as check_strategy
