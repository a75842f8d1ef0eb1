"""Tests below ``interpreted`` need Triton's interpreter, which has to be asked for before Triton is imported.

So they are not collected here; ``test_interpreted.py`` runs them in a process of their own.
"""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
