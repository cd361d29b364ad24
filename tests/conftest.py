"""What all tests have in common: threads, and that no test fails for being slow."""

import os

# Where pytest runs in several processes, as many threads as each has cores: more would wait for each other. Before
# torch is imported, and also for the processes that tests start.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    processes = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))

from hypothesis import settings

settings.register_profile("curlora", deadline=None)
settings.load_profile("curlora")

LONG = {"test_accelerator.py", "test_cli.py", "test_resume.py", "test_study.py", "test_workers.py"}


def pytest_collection_modifyitems(items):
    """Put the longest tests first, so that at the end no process waits for another's."""
    items.sort(key=lambda item: item.path.name not in LONG)
