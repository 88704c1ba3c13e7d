"""How the dynamic ratio falls from 1 to κ in T rounds."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

from padconvert.plan import exact_count


def ratio_at(ratio: Decimal, rounds: int, t: int, schedule: str) -> Fraction:
    """κ_t of round t = 1..T: exponential κ^(t/T), or linear 1 − (1 − κ)·t/T. κ_T is exactly κ.

    κ = 0 has no exponential way to it (0^(t/T) is 0 at once) and goes linearly.
    """
    if t == rounds:
        return Fraction(ratio)
    if schedule == "exponential" and ratio > 0:
        return Fraction(float(ratio) ** (t / rounds))
    return 1 - (1 - Fraction(ratio)) * Fraction(t, rounds)


def count_at(ratio: Decimal, rounds: int, t: int, schedule: str, n: int) -> int:
    """How many of `n` entries are dynamic after round t: ⌊κ_t · n + ½⌋, exactly."""
    if t == rounds:
        return exact_count(ratio, n)
    return int(ratio_at(ratio, rounds, t, schedule) * n + Fraction(1, 2))
