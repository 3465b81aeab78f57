"""Tests run the notebooks at a small size. `GRADFLOW_QUICK=` in the environment runs them as they are."""

import os

os.environ.setdefault("GRADFLOW_QUICK", "1")
