"""What a trial leaves of its pictures, to be drawn when someone looks: tuner.dashboard.plots.

Drawing takes longer than training a head does, and most trials are never looked at. No matplotlib
here: workers import this.
"""

import json
from typing import Any

KIND_KEY = "tuner:figure"
PREFIX = f'{{"{KIND_KEY}":'.encode()


def defer_figure(kind: str, **shown: Any) -> bytes:
    """What `tuner.dashboard.plots.drawn` makes a picture of.

    The name of a function there, and its arguments as JSON.
    """
    return json.dumps({KIND_KEY: kind, **shown}).encode()
