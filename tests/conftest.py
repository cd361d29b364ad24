"""What all tests have in common: threads, that no test fails for being slow, that small tensors are as large ones."""

import os

# Where pytest runs in several processes, as many threads as each has cores: more would wait for each other. Before
# torch is imported, and also for the processes that tests start.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    processes = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))

import pytest
from hypothesis import settings

settings.register_profile("curlora", deadline=None)
settings.load_profile("curlora")


@pytest.fixture(autouse=True, scope="session")
def small_tensors_are_changed_in_place_too():
    """As the large ones of a real model are: a test's are few numbers, which are not asked about by themselves."""
    from curlora import alone

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alone, "WORTH_ASKING", 0)
        yield
