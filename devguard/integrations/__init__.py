"""Frameworks whose processes have roles: which GPU each of them owns is known without a line of the user's code.

One module for each framework. `arm` makes them wait for the framework's import; it imports none.
"""

from __future__ import annotations

__all__ = ["arm"]


def arm() -> None:
    """Let every integration wait for its framework; called when devguard is activated by environment."""
