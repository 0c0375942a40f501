"""What reads input from outside, with inputs for it. Each takes its input or raises a RopewalkError, nothing else."""

from __future__ import annotations

from checkpoint_parsers import CHECKPOINTS
from parser import Parser
from request_parsers import REQUESTS
from run_parsers import RUNS
from spec_parsers import SPECS
from text_parsers import TEXTS

PARSERS: dict[str, Parser] = {**SPECS, **CHECKPOINTS, **TEXTS, **RUNS, **REQUESTS}
