from .state import RandomState as RandomState
