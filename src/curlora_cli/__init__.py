"""The ``curlora`` command.

It is a package beside ``curlora``, because importing ``curlora`` registers the adapter with PEFT and so imports torch.
Help, completion and the version do not need torch.
"""

from __future__ import annotations

import logging
import os
import signal

__all__ = ["libraries_loaded", "main"]


def main() -> None:
    """Entry point of the ``curlora`` command."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell may have set it to be ignored
        signal.signal(signal.SIGINT, _leave)
    from curlora_cli.commands import app

    app()


def libraries_loaded() -> None:
    """Let libraries log again, and let Ctrl-C raise ``KeyboardInterrupt``, since there is work to save from here on."""
    logging.disable(logging.NOTSET)
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(*_: object) -> None:
    """Exit at once on Ctrl-C while libraries are imported, without a traceback."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"Interrupted before anything was started.\n")
    os._exit(130)
