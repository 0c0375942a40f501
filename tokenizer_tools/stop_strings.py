"""Stop strings: where a text that is being written ends.

A stop string may be spread over several tokens, so text that can be the beginning of one is held back until the next
tokens decide.
"""

from __future__ import annotations


class StopStringMatcher:
    """Ends a text before the first stop string. It holds back text that can be the start of one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""  # can be the start of a stop string
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is certain to come before any stop string, after the text returned before."""
        self._held += text
        starts = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if starts:
            self.stopped = True
            safe, self._held = self._held[: min(starts)], ""
            return safe
        length = max(
            (
                n
                for stop in self._stops
                for n in range(1, min(len(stop), len(self._held) + 1))
                if self._held.endswith(stop[:n])
            ),
            default=0,
        )
        end = len(self._held) - length
        safe, self._held = self._held[:end], self._held[end:]
        return safe

    @property
    def hides_text(self) -> bool:
        """True if some of the text has not been returned."""
        return self.stopped or bool(self._held)

    def finish(self) -> str:
        """The rest of the text at the end of the stream."""
        rest, self._held = self._held, ""
        return rest
