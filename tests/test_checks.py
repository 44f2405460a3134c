"""Checks of plain arguments."""

from fractions import Fraction

import numpy as np
import pytest

from dynloss_ext._checks import check_count, check_number, check_seed


def test_what_is_allowed_comes_back_as_a_plain_number() -> None:
    for given in (1, 7, np.int64(3), np.uint8(5), np.array(4)):
        value = check_count("k", given, 1, 7, "the size of H")
        assert value == given
        assert type(value) is int
    for given in (0, 0.5, np.float32(0.25), np.float16(0.5), np.array(0.75), np.int8(0), Fraction(1, 3)):
        number = check_number("tol", given, 0, 1)
        assert number == pytest.approx(float(given), rel=0, abs=0)
        assert type(number) is float


@pytest.mark.parametrize(
    "value", [1.0, "a", None, True, np.float64(1), np.bool_(True), [1], np.array(1.0), np.array(True)]
)
def test_what_is_no_int_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match=rf"^k: expected an int, got {type(value).__name__}$"):
        check_count("k", value, 1)
    with pytest.raises(TypeError, match=rf"^seed: expected an int, got {type(value).__name__}$"):
        check_seed(value)


def test_a_count_out_of_bounds_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^k: expected an int >= 1, got 0$"):
        check_count("k", 0, 1)
    with pytest.raises(ValueError, match=r"^k: expected an int from 1 to 4, got 5$"):
        check_count("k", 5, 1, 4)
    with pytest.raises(ValueError, match=r"^k: expected an int from 1 to 4, the size of H, got 0$"):
        check_count("k", np.int32(0), 1, 4, "the size of H")


@pytest.mark.parametrize("value", ["x", None, False, 1j, [0.5], np.bool_(True), np.array([0.5, 1.0])])
def test_what_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match=r"^tol: expected a number in \[0, 1\), got ") as error:
        check_number("tol", value, 0, 1)
    assert str(error.value).endswith(repr(value))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1e-300, 10**400])
def test_a_number_out_of_its_interval_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=rf"^rest: expected a number in \[0, inf\), got {value!r}$"):
        check_number("rest", value, 0)


def test_the_ends_of_an_interval() -> None:
    assert check_number("tol", 0, 0, 1) == 0
    with pytest.raises(ValueError, match=r"^tol: expected a number in \[0, 1\), got 1$"):
        check_number("tol", 1, 0, 1)
    with pytest.raises(ValueError, match=r"^bandwidth: expected a number in \(0, inf\), got 0\.0$"):
        check_number("bandwidth", 0.0, 0, open_low=True)


def test_any_int_is_a_seed() -> None:
    assert [check_seed(value) for value in (0, 5, np.int64(7), 2**64 + 1, -1)] == [0, 5, 7, 1, 2**64 - 1]
