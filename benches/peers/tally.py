"""The arithmetic of a comparison: whose turn it is, what a round says, the table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


class NotMeasured(Exception):
    """A figure needs a contender that did not run."""


@dataclass
class Run:
    """One contender's turn. What could not be read is None."""

    seconds: float
    nbytes: int
    client_cpu_s: float | None = None
    server_cpu_s: float | None = None
    client_rss_bytes: int | None = None
    server_rss_bytes: int | None = None
    client_anon_bytes: int | None = None
    server_anon_bytes: int | None = None
    note: str = ""

    @property
    def gib_per_s(self) -> float:
        return self.nbytes / GIB / self.seconds

    @property
    def cpu_s_per_gib(self) -> float | None:
        """Core-seconds of both sides together for each GiB."""
        known = [cpu for cpu in (self.client_cpu_s, self.server_cpu_s) if cpu is not None]
        return sum(known) / (self.nbytes / GIB) if known else None


def rotated(names: Sequence[str], round_index: int) -> list[str]:
    """The order of a round: every contender comes first once before any does so again."""
    if not names:
        return []
    first = round_index % len(names)
    return [*names[first:], *names[:first]]


@dataclass
class Tally:
    """All rounds that count; each holds one run of every contender."""

    rounds: list[dict[str, Run]] = field(default_factory=list)

    def runs(self, name: str) -> list[Run]:
        found = [found[name] for found in self.rounds if name in found]
        if not found:
            raise NotMeasured(name)
        return found

    def speed(self, name: str) -> float:
        """GiB/s, median."""
        return statistics.median(run.gib_per_s for run in self.runs(name))

    def fastest(self, names: Iterable[str]) -> str:
        """The one with the highest median speed among those that ran."""
        ran = [name for name in names if any(name in found for found in self.rounds)]
        if not ran:
            raise NotMeasured("none of them")
        return max(ran, key=self.speed)

    def ratio(self, name: str, to: str) -> float:
        """How many times as fast as `to`: the median of what each round says."""
        return statistics.median(n.gib_per_s / t.gib_per_s for n, t in self._pairs(name, to))

    def cpu_ratio(self, name: str, to: str) -> float:
        """How much processor time in the time that `to` needs: the median of what each round says."""
        pairs = [(n.cpu_s_per_gib, t.cpu_s_per_gib) for n, t in self._pairs(name, to)]
        known = [n / t for n, t in pairs if n is not None and t]
        if not known:
            raise NotMeasured(f"processor time of {name} or {to}")
        return statistics.median(known)

    def _pairs(self, name: str, to: str) -> list[tuple[Run, Run]]:
        pairs = [(found[name], found[to]) for found in self.rounds if name in found and to in found]
        if not pairs:
            raise NotMeasured(f"{name} beside {to}")
        return pairs


def table(tally: Tally, names: Sequence[str], yardstick: str, words: str) -> str:
    """One line for each contender, as Markdown; `words` call the one that the others are shares of."""
    rows = [(
        "contender", "GiB/s median (min–max)", "s", f"of {words}", "core-s/GiB client + server",
        "peak RSS client / server", "of it anonymous", "note",
    )]  # fmt: skip
    for name in names:
        try:
            runs = tally.runs(name)
        except NotMeasured:
            continue
        speeds = [run.gib_per_s for run in runs]
        try:
            share = f"{tally.ratio(name, yardstick):.2f}"
        except NotMeasured:
            share = "–"
        rows.append((
            name,
            f"{statistics.median(speeds):.2f} ({min(speeds):.2f}–{max(speeds):.2f})",
            f"{statistics.median(run.seconds for run in runs):.2f}",
            share,
            f"{per_gib(runs, 'client_cpu_s')} + {per_gib(runs, 'server_cpu_s')}",
            f"{peak(runs, 'client_rss_bytes')} / {peak(runs, 'server_rss_bytes')}",
            f"{peak(runs, 'client_anon_bytes')} / {peak(runs, 'server_anon_bytes')}",
            runs[-1].note,
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def per_gib(runs: Sequence[Run], what: str) -> str:
    """Median core-seconds for each GiB of one side."""
    known = [getattr(run, what) / (run.nbytes / GIB) for run in runs if getattr(run, what) is not None]
    return f"{statistics.median(known):.2f}" if known else "–"


def peak(runs: Sequence[Run], what: str) -> str:
    """The highest of all rounds, in words."""
    known = [getattr(run, what) for run in runs if getattr(run, what) is not None]
    return f"{max(known) / MIB:,.0f} MiB" if known else "–"
