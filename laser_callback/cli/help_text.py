"""The help of a command: jsonargparse's, with types as a person writes them."""

from __future__ import annotations

from argparse import Action

from jsonargparse import DefaultHelpFormatter
from typing_extensions import override

from laser_callback.cli.mistakes import readable_types


class PlainHelp(DefaultHelpFormatter):
    """``str | null`` in place of ``Optional[str]``, and ``Path`` in place of ``<class 'pathlib.Path'>``."""

    @override
    def _get_type_str(self, action: Action) -> str | None:
        text = super()._get_type_str(action)
        return None if text is None else readable_types(text)
