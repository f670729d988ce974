"""All styles of LightningModules, for the tests that compare two evaluations of each."""

from __future__ import annotations

import styles_logging
import styles_metrics
import styles_models
import styles_state
from styles import STYLES

# A class enters the list when its module is imported.
assert {cls.__module__ for cls in STYLES} == {
    module.__name__ for module in (styles_metrics, styles_state, styles_logging, styles_models)
}
