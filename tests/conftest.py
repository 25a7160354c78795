"""One thread: the tests' networks are tiny, and two threads that wait for each other crawl on a busy machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported, here and in child processes
