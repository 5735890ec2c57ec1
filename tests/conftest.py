"""For every test: one thread a process, since the suite runs one process a core."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in the tests' subprocesses
os.environ.setdefault("WANDB_MODE", "offline")
