"""One thread.

The tests' networks are tiny, and two threads that wait for each other crawl on a busy machine.
"""

import os

# read when torch is first imported, here and in child processes
os.environ.setdefault("OMP_NUM_THREADS", "1")
