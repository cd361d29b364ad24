"""The demo: three real tasks, three methods, on a small language model; no hub needed."""

from curlora.demo.run import run_demo

__all__ = ["run_demo"]
