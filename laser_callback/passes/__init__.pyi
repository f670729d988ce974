from .drops import Droppable as Droppable
from .drops import droppable as droppable
from .state import RandomState as RandomState
