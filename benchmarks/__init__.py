"""As in ``stages``: before torch is imported, OpenMP's threads are told to sleep while they wait."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
