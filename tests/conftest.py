"""What all tests have in common: threads, and that no test fails for being slow."""

import os

# As many as a process of pytest's has cores: more would wait for each other. Before torch is imported, and also for the
# processes that tests start.
_PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _PROCESSES)))

from hypothesis import settings  # noqa: E402

settings.register_profile("curlora", deadline=None)
settings.load_profile("curlora")
