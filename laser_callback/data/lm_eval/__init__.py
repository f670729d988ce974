"""Tasks of lm-evaluation-harness: its documents, prompts, filters and metrics; the rest is this package's.

``source`` reads ``lm_eval:TASK?options`` and lets ``lm_eval`` (optional) build the task; a task of ``choices`` becomes
facts with choices, one of ``answers`` facts whose answers are written, and one of ``documents`` running text.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
