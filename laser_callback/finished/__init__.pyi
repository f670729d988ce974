from .again import rerun as rerun
from .logged import FinishedRun as FinishedRun
from .logged import LoggedExample as LoggedExample
from .logged import LoggedTask as LoggedTask
from .pairing import compare_runs as compare_runs
from .reading import read_run as read_run
