from __future__ import annotations

import pytest

import qsweep


@pytest.mark.parametrize("name", qsweep.__all__)
def test_every_public_name_can_be_had(name: str) -> None:
    assert getattr(qsweep, name).__module__.startswith("qsweep.")


def test_other_names_are_refused_as_by_any_module() -> None:
    with pytest.raises(AttributeError, match="`qsweep` has no attribute `quantise`"):
        _ = qsweep.quantise


def test_what_help_lists_is_what_is_public() -> None:
    assert dir(qsweep) == sorted(qsweep.__all__)
