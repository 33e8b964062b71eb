"""Makes the agent's package importable in the trainer's environment; the part that tests import needs numpy only."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "server-image/src"))
