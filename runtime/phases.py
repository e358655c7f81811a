"""Where the time goes: milliseconds by phase."""

import time
from dataclasses import dataclass, field


@dataclass
class PhaseTimes:
    """Milliseconds by phase; `mark` adds the time since the last mark."""

    phases: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.perf_counter)
    _begin: float = field(default_factory=time.perf_counter)

    def mark(self, phase: str) -> None:
        self.phases[phase] = self.phases.get(phase, 0.0) + self._since_last()

    def include(self, before: str, part: "PhaseTimes") -> None:
        """Take over the phases of a part that kept its own time; what came before it is the phase `before`."""
        self.phases[before] = self.phases.get(before, 0.0) + (part._begin - self._last) * 1e3
        for phase, passed in part.phases.items():
            self.phases[phase] = self.phases.get(phase, 0.0) + passed
        self._last = part._last

    def _since_last(self) -> float:
        now = time.perf_counter()
        passed, self._last = (now - self._last) * 1e3, now
        return passed
