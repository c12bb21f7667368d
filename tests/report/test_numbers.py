import pytest

from fedsim.report import numbers


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (12_345, "12.3 kB"), (999_700, "1000 kB"), (5.4e12, "5.40 TB")],
)
def test_bytes_are_shown_in_decimal_units(count, text):
    assert numbers.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.00 s"), (9.994, "9.99 s"), (59.4, "59.4 s"), (60, "1 min 0 s"), (3600, "1 h 0 min"), (90_000, "1 d 1 h")],
)
def test_durations_are_shown_with_two_units(seconds, text):
    assert numbers.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.123456, "0.1235"), (-3.0, "-3"), (1234.5, "1,234"), (1_000_000, "1,000,000"), (2.5, "2.5")]
)
def test_numbers_have_four_digits_or_are_whole(value, text):
    assert numbers.number(value) == text


def test_what_is_absent_is_a_dash_everywhere():
    assert {f(None) for f in (numbers.percent, numbers.number, numbers.size, numbers.duration)} == {numbers.ABSENT}


@pytest.mark.parametrize(
    ("mean", "std", "text"),
    [
        (1.021, 0.19, "1.02 ± 0.19"),
        (1.0, 0.0996, "1.00 ± 0.10"),  # two digits after rounding, not before
        (52.4, 42.0, "52 ± 42"),
        (-3.14159, 0.5, "-3.14 ± 0.50"),
        (98765, 1234, "98,800 ± 1,200"),
        (0.25, 0.0, "0.25 ± 0.00"),
        (0.3, 3e-9, "0.300000 ± 0.000000"),
    ],
)
def test_a_deviation_has_two_digits_and_its_mean_ends_at_the_same_place(mean, std, text):
    assert numbers.spread(mean, std) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(59, "59.0 ± 1.5 s"), (90, "1.500 ± 0.025 min"), (7200, "2.00000 ± 0.00042 h")]
)
def test_mean_times_are_told_in_one_unit(seconds, text):
    unit, name = numbers.time_unit(seconds)
    assert numbers.spread(seconds, 1.5, unit=unit, name=name) == text
