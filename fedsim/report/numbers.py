"""Numbers as text, the same in reports and on the command line."""

ABSENT = "–"  # a dash, as in a printed table


def percent(fraction: float | None, digits: int | None = 2) -> str:
    """A fraction as per cent; ``digits`` None writes as few as needed.

    >>> percent(0.9142), percent(0.8, None), percent(None)
    ('91.42 %', '80 %', '–')
    """
    if fraction is None:
        return ABSENT
    return f"{100 * fraction:g} %" if digits is None else f"{100 * fraction:.{digits}f} %"


def number(value: float | None) -> str:
    """Four significant digits; whole numbers in full, with thousands set apart.

    >>> number(0.28765), number(12345), number(None)
    ('0.2877', '12,345', '–')
    """
    if value is None:
        return ABSENT
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:.4g}"


def byte_unit(count: float) -> tuple[int, str]:
    """The decimal unit in which a number of bytes is best told: how many bytes it has, and its name."""
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if count >= 1000**power:
            return 1000**power, unit
    return 1, "B"


def size(count: float | None) -> str:
    """Bytes in decimal units.

    >>> size(999), size(24_700_000)
    ('999 B', '24.7 MB')
    """
    if count is None:
        return ABSENT
    divisor, unit = byte_unit(count)
    scaled = count / divisor
    digits = 0 if divisor == 1 or scaled >= 100 else 1 if scaled >= 10 else 2
    return f"{scaled:.{digits}f} {unit}"


def duration(seconds: float | None) -> str:
    """Wall time with the two largest units.

    >>> duration(0.4), duration(75), duration(7260)
    ('0.40 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds is None:
        return ABSENT
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    first = next(i for i, (amount, _) in enumerate(parts) if amount)
    return " ".join(f"{amount} {unit}" for amount, unit in parts[first : first + 2])


MAX_DECIMALS = 6


def spread(mean: float, std: float, *, unit: float = 1, name: str = "", decimals: int = MAX_DECIMALS) -> str:
    """Mean ± deviation: the deviation to two significant digits, the mean to the same decimal place.

    Args:
        mean: in what it was measured in.
        std: likewise, >= 0.
        unit: how much of that the shown unit is.
        name: of the unit.
        decimals: no more than these, however small the deviation.

    >>> spread(1.0212, 0.1875), spread(0.7815, 0.1153, unit=0.01, name="%"), spread(1234, 123)
    ('1.02 ± 0.19', '78 ± 12 %', '1,230 ± 120')
    """
    mean, std = mean / unit, std / unit
    exponent = int(f"{std:.1e}".partition("e")[2])  # of the rounded deviation: that of 9.96 is 1
    places = min(1 - exponent, decimals) if std > 0 else 2
    told = " ± ".join(f"{round(value, places):,.{max(places, 0)}f}" for value in (mean, std))
    return f"{told} {name}".rstrip()


def time_unit(seconds: float) -> tuple[int, str]:
    """The largest of hour, minute and second that fits: how many seconds it has, and its name."""
    return next(((length, name) for length, name in ((3600, "h"), (60, "min")) if seconds >= length), (1, "s"))
