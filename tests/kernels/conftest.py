"""These tests run the kernels in Triton's interpreter, which must be chosen before Triton is imported.

So tests/test_kernels.py runs them in separate processes. To run them directly:

    TRITON_INTERPRET=1 python -m pytest tests/kernels
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
