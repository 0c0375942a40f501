"""How many examples a hypothesis test runs, where the default of the profile is too few or too many."""

from typing import Any

from hypothesis import settings


def examples(count: int, **more: Any) -> settings:
    """Settings with `count` examples under the profile of `make test`, and as many times more as the profile in use
    has more than that one. (A plain `settings(max_examples=...)` runs the same number under every profile.)"""
    usual = settings.get_profile("ropewalk").max_examples
    return settings(max_examples=count * settings.default.max_examples // usual, **more)
