"""One thread a test process: two on a busy two-core machine can wait for each other for minutes."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
