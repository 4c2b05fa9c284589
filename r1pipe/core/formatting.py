"""How numbers are written for people: on the screen, in tables, in the report."""


def duration(seconds: float | None) -> str:
    """`4.2s`, `42s`, `3m05s`, `2h10m`, `3d04h`; `-` when unknown."""
    if seconds is None:
        return "-"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02d}h"
    return f"{hours}h{m:02d}m" if hours else f"{m}m{s:02d}s" if m else f"{s}s"


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits, thousands without an exponent (0.0123, 4.56, 21,300); `-` when unknown."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def percent(share: float | None) -> str:
    """A share in 0..1 as a percentage without its sign: 85.3; `-` when unknown."""
    return "-" if share is None else f"{100 * share:.1f}"
