"""Hypothesis without a deadline: these tests share their machine, and a slow example is not a wrong one."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("scaling", deadline=None, max_examples=50)
settings.load_profile("scaling")
