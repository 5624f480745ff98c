"""One thread a process, set before torch is imported: two test processes have two cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
