"""
How the threads of a CPU wait for each other. Commands import this before torch, whose OpenMP reads it once.

By default a thread that waits keeps its core busy for milliseconds. That is fastest on an idle machine, but
beside any other load on the cores it takes the time away from the thread that it waits for: training runs at
a third of its share of the cores. With a short busy wait it runs at three quarters, and an idle machine loses
about 1 % (LOG.md). Who sets one of these variables decides.
"""

import os

SPINS = "2000"  # turns of the busy loop before a thread sleeps

if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}:
    os.environ["GOMP_SPINCOUNT"] = SPINS
