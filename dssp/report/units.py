"""Numbers as people read them: three digits and a unit, the dash for what is not known."""

from __future__ import annotations

DASH = "\N{EN DASH}"


def percent(share: float | None) -> str:
    """0.9756 -> 97.56 %"""
    return DASH if share is None else f"{share * 100:.2f}\N{NO-BREAK SPACE}%"


def count(number: float | None, unit: str = "") -> str:
    """3349000 -> 3.35 M; with a unit, 3.35 MFLOPs."""
    if number is None:
        return DASH
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= 0.9995 * size:
            return f"{_three_digits(number / size)}\N{NO-BREAK SPACE}{prefix}{unit}"
    return f"{number:.0f}\N{NO-BREAK SPACE}{unit}".rstrip()


def duration(seconds: float | None) -> str:
    """0.0312 -> 31.2 ms; 5.31 -> 5.31 s; 4000 -> 1 h 7 min."""
    if seconds is None:
        return DASH
    if seconds < 1:
        return f"{_three_digits(seconds * 1000)}\N{NO-BREAK SPACE}ms"
    if seconds < 99.95:
        return f"{_three_digits(seconds)}\N{NO-BREAK SPACE}s"
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}\N{NO-BREAK SPACE}min {seconds}\N{NO-BREAK SPACE}s"
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}\N{NO-BREAK SPACE}d " * (days > 0) + f"{hours}\N{NO-BREAK SPACE}h {minutes}\N{NO-BREAK SPACE}min"


def _three_digits(number: float) -> str:
    return f"{number:.{2 if abs(number) < 9.995 else 1 if abs(number) < 99.95 else 0}f}"
