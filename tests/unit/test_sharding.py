"""`--shard i/n`: every case in one shard, the same one everywhere, and none with much more than its part."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attncheck import sharding
from attncheck.errors import UserError
from attncheck.model import Case, case_id
from attncheck.sharding import CASE_SECONDS, SEARCH_SECONDS, Shard


def make(
    probe: str,
    operator: str,
    setting: str,
    placement: str = "heads",
    ranks: int = 2,
    **options: object,
) -> Case:
    mesh = {"tp": ranks}
    return Case(
        id=case_id(probe, operator, setting, "dtensor", mesh, placement, "forward"),
        probe=probe,
        operator=operator,
        route="dtensor",
        setting={"name": setting, **options},
        mesh=mesh,
        placement=placement,
        placements={"q": ("S(1)",)},
        direction="forward",
    )


NAMES = st.sampled_from("abcd")
CASES = st.lists(
    st.builds(
        make,
        NAMES,
        NAMES,
        NAMES,
        st.sampled_from(["replicate", "batch", "heads"]),
        st.integers(1, 3),
    ),
    min_size=1,
    max_size=40,
    unique_by=lambda case: case.id,
)
PRICES = st.dictionaries(NAMES, st.floats(0, 100), min_size=4, max_size=4)


def priced(prices: dict[str, float]):
    """What a unit costs: by its operators, and something once."""

    def cost(cases: Sequence[Case]) -> float:
        return prices[cases[0].setting_name] + sum(prices[case.operator] for case in cases)

    return cost


def shares(cases: Sequence[Case], of: int, cost) -> list[tuple[int, ...]]:
    return [sharding.split(cases, Shard(index, of), cost) for index in range(1, of + 1)]


def unit(case: Case) -> tuple[object, ...]:
    return (tuple(case.mesh.items()), case.probe, case.setting_name)


@given(CASES, PRICES, st.data())
def test_every_case_is_in_one_shard_in_the_order_of_the_plan(cases, prices, data) -> None:
    of = data.draw(st.integers(1, len(cases)))
    parts = shares(cases, of, priced(prices))
    assert sorted(at for part in parts for at in part) == list(range(len(cases)))
    assert all(list(part) == sorted(part) and part for part in parts)
    assert shares(cases, of, priced(prices)) == parts


@given(CASES, PRICES, st.data())
def test_what_shares_a_setting_stays_together(cases, prices, data) -> None:
    units = {unit(case) for case in cases}
    of = data.draw(st.integers(1, len(units)))
    parts = shares(cases, of, priced(prices))
    assert sum(len({unit(cases[at]) for at in part}) for part in parts) == len(units)


@given(CASES, PRICES, st.data())
def test_no_shard_costs_more_than_the_mean_and_the_largest_unit(cases, prices, data) -> None:
    groups: dict[object, list[Case]] = {}
    for case in cases:
        groups.setdefault(unit(case), []).append(case)
    of = data.draw(st.integers(1, len(groups)))
    costs = {name: priced(prices)(members) for name, members in groups.items()}
    loads = [
        sum(costs[name] for name in {unit(cases[at]) for at in part})
        for part in shares(cases, of, priced(prices))
    ]
    bound = sum(costs.values()) / of + max(costs.values())
    assert max(loads) <= bound * (1 + 1e-9)


@given(CASES, PRICES, st.integers(0, 40), st.data())
def test_a_cheap_operator_more_moves_nothing(cases, prices, where, data) -> None:
    of = data.draw(st.integers(1, len({unit(case) for case in cases})))
    added = make("other", "other", "other")
    more = [*cases[:where], added, *cases[where:]]
    prices = {name: price + 1 for name, price in prices.items()}

    def cost(cases: Sequence[Case]) -> float:
        return 0.5 if cases[0] is added else priced(prices)(cases)

    for before, after in zip(shares(cases, of, cost), shares(more, of, cost), strict=True):
        assert {cases[at].id for at in before} == {more[at].id for at in after} - {added.id}


def test_fewer_settings_than_shards_are_cut_into_cases() -> None:
    cases = [make("p", "o", "plain", placement) for placement in ("replicate", "batch", "heads")]
    assert shares(cases, 3, len) == [(1,), (2,), (0,)]  # equally dear: by name


def test_more_shards_than_cases_is_refused() -> None:
    cases = [make("p", "o", "plain", placement) for placement in ("batch", "heads")]
    with pytest.raises(UserError, match=r"Shard 1/3: there are only 2 cases"):
        sharding.split(cases, Shard(1, 3), len)


@pytest.mark.parametrize(
    ("text", "shard"), [("1/1", (1, 1)), ("2/3", (2, 3)), (" 12/12 ", (12, 12))]
)
def test_shards_are_read(text: str, shard: tuple[int, int]) -> None:
    assert sharding.parse(text) == Shard(*shard)


@pytest.mark.parametrize(
    "text",
    ["0/3", "4/3", "0/0", "x/y", "2", "2/", "/3", "-1/3", "1/-3", "1.0/2", "1/3/5", "", "1 /3"],
)
def test_what_is_no_shard_is_named(text: str) -> None:
    with pytest.raises(UserError) as error:
        sharding.parse(text)
    assert repr(text) in str(error.value)
    assert "expected" in str(error.value)


# --- what a case is expected to cost ----------------------------------------------------------------

SLOW = {"dear"}


@pytest.mark.parametrize(
    ("cases", "searches"),
    [
        ([make("p", "dear", "plain")], 1),
        ([make("p", "dear", "plain"), make("p", "dear", "plain", "batch")], 1),  # paid once
        ([make("p", "dear", "plain", ranks=4)], 2),  # twice the ranks on the same cores
        ([make("p", "cheap", "plain")], 0),
        ([make("p", "dear", "plain", "replicate")], 0),
        ([make("p", "dear", "plain", "replicate,replicate")], 0),
        ([make("p", "dear", "plain", "batch,replicate")], 1),
        ([make("p", "dear", "causal", causal=True)], 0),
        ([make("p", "dear", "causal", causal=False)], 1),
        ([make("p", "dear", "mask", mask_as="plain")], 0),
        ([make("p", "dear", "mask", mask_as="sharded")], 1),
        ([make("p", "dear", "dropout", dropout=0.25)], 0),
    ],
)
def test_a_slow_operator_searches_once_a_setting(cases: list[Case], searches: int) -> None:
    each = CASE_SECONDS * sum(case.mesh["tp"] for case in cases) / 2
    assert sharding.expected_seconds(cases, SLOW) == pytest.approx(searches * SEARCH_SECONDS + each)


def test_what_cannot_run_here_costs_next_to_nothing() -> None:
    cases = [make("p", "dear", "plain")] * 10
    assert sharding.expected_seconds(cases, SLOW, absent={"dear"}) < CASE_SECONDS


DIVIDE = """
from attncheck import plugins, plan, sharding
probes = plugins.load_probes([]).probes
cases = plan.plan(probes, {"tp": 2}, plan.Selection())
slow = {o.name for p in probes for o in p.operators if o.slow}
cost = lambda cases: sharding.expected_seconds(cases, slow)
print(len(cases), [sharding.split(cases, sharding.Shard(i, 4), cost) for i in range(1, 5)])
"""


def test_a_real_plan_is_divided_alike_whatever_the_hash_seed() -> None:
    said = [
        subprocess.run(
            [sys.executable, "-c", DIVIDE],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert said[0] == said[1]
    assert int(said[0].split(" ", 1)[0]) > 1000
