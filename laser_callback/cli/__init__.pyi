from .commands import COMMANDS as COMMANDS
from .commands import main as main
