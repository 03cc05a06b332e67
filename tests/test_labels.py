from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from qsweep.track.labels import PLACES, around, box_of, overlap, placed

SHARE = st.floats(0.2, 0.8)
MIDDLE = (0.5, 0.5)


@given(st.lists(st.tuples(SHARE, SHARE), min_size=1, max_size=8))
def test_a_name_stands_where_it_covers_nothing_if_there_is_such_a_place(points: list[tuple[float, float]]) -> None:
    names = ["ptq-w8s-a8a"] * len(points)
    taken = [around(point) for point in points]
    for name, point, place in zip(names, points, placed(names, points, points), strict=True):
        box = box_of(point, name, place)
        beside = [sum(overlap(box_of(point, name, other), there) for there in taken) for other in PLACES]
        assert sum(overlap(box, there) for there in taken) <= min(beside)
        taken.append(box)


def test_names_of_points_on_each_other_do_not_lie_on_each_other() -> None:
    names = ["fp32", "bf16", "ptq-w8s-a8a", "compiled"]
    places = placed(names, [MIDDLE] * 4, [MIDDLE] * 4)
    boxes = [box_of(MIDDLE, name, place) for name, place in zip(names, places, strict=True)]
    assert [overlap(one, other) for one, other in combinations(boxes, 2)] == [0.0] * 6
    assert places[:2] == ["top center", "bottom center"]


def test_a_name_stays_within_the_chart() -> None:
    assert placed(["ptq-w8s-a8a"], [(0.99, 0.5)], []) == ["middle left"]
    assert placed(["fp32"], [(0.5, 0.99)], []) == ["bottom center"]
