"""For ``python -m curlora_cli``, and so for ``torchrun`` and ``accelerate launch``."""

from curlora_cli import main

main()
