"""Tables in YAML files that come with the package."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import yaml


def read_table(package: str, name: str) -> dict[str, Any]:
    """What is in the YAML file ``name`` of a package, such as ``laser_callback.plans``."""
    fast = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # PyYAML may have been built without libyaml
    return yaml.load(files(package).joinpath(name).read_bytes(), fast)
