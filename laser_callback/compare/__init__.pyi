from .again import rerun as rerun
from .callback import LaserCallback as LaserCallback
from .controls import noise_plan as noise_plan
from .controls import random_plan as random_plan
from .controls import zeroed_plan as zeroed_plan
from .measure import Lab as Lab
from .module import LaserModule as LaserModule
from .runs import compare_runs as compare_runs
