"""What the dispatcher gives to extras, for a tree that has none yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def give(llmstack: Any) -> None:
    """Give the module the two functions of the dispatcher that extras use."""
    if hasattr(llmstack, "load_extra"):
        return

    def load_extra(name: str) -> Any:
        path = ROOT / "extras" / (name.replace("-", "_") + ".py")
        module: Any = type(llmstack)("llmstack_" + path.stem)
        module.__file__ = str(path)
        exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), module.__dict__)
        return module

    def extra_parser(name: str, doc: str) -> Any:
        import argparse
        return argparse.ArgumentParser("llmstack " + name, description=doc,
                                       formatter_class=argparse.RawDescriptionHelpFormatter)

    llmstack.load_extra, llmstack.extra_parser = load_extra, extra_parser
