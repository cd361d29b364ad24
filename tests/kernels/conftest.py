"""Kernels run here in Triton's interpreter, which has to be chosen before Triton is imported.

So these tests are run in processes of their own, by tests/test_kernels.py, and by themselves with

    TRITON_INTERPRET=1 python -m pytest tests/kernels
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
