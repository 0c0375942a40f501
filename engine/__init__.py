"""Loading, patching, decoding. Import the public names from `ropewalk` itself."""

from __future__ import annotations

if not __name__.startswith("ropewalk."):
    raise ImportError("import this package as 'ropewalk.engine'")
