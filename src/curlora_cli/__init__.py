"""The ``curlora`` command.

It lies beside the package ``curlora`` and not in it: importing that one registers CURLoRA with PEFT, as users of PEFT
want it, and so imports torch. Help, completion and the version need none of it.
"""

from __future__ import annotations

import logging
import os
import signal

__all__ = ["libraries_loaded", "main"]


def main() -> None:
    """Entry point of the ``curlora`` command."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell may have told us to ignore it
        signal.signal(signal.SIGINT, _leave)
    from curlora_cli.commands import app

    app()


def libraries_loaded() -> None:
    """From here on libraries may log again, and Ctrl-C raises ``KeyboardInterrupt``, for there is something to save."""
    logging.disable(logging.NOTSET)
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(*_: object) -> None:
    """Ctrl-C while libraries are imported: they need not be unwound, nor show where they were."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"Interrupted. Nothing was begun.\n")
    os._exit(130)
