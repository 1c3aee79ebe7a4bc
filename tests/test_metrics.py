"""Counters of a window, recomputed by hand, and what Prometheus scrapes."""

from __future__ import annotations

import pytest
from cases import Geometry
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.parser import text_string_to_metric_families
from window_support import ALL, NONE, SOME, Rig, rig

from nwor_compile import Metrics, NworCollector

ROW = 3 * 2 * 2 * 8 * 4  # three layers, K and V, two heads of eight float32
NAMES = {
    "nwor_windows",
    "nwor_total_staged",
    "nwor_total_committed",
    "nwor_total_rejected",
    "nwor_acceptance_rate",
    "nwor_acceptance_rate_per_position",
    "nwor_drafted_per_position",
    "nwor_accepted_per_position",
    "nwor_fallback_count",
    "nwor_scv_vectorised",
    "nwor_error_windows",
    "nwor_unique_tokens",
    "nwor_stage_operations",
    "nwor_certain_rows",
    "nwor_cache_bytes",
    "nwor_staging_bytes_moved",
    "nwor_direct_bytes",
}


def three_windows(r: Rig) -> None:
    """3 + 5 + 1 drafts each: 6 accepted, none, all 9; eleven certain tokens in each."""
    r.run(SOME)
    r.run(NONE)
    r.run(ALL)


@pytest.mark.parametrize("scv", ["off", "graph", "adaptive"])
def test_the_numbers_are_those_computed_by_hand(scv: str) -> None:
    with rig(layers=3, scv=scv) as r:
        three_windows(r)
        assert r.window.metrics() == Metrics(
            nwor_windows=3,
            nwor_total_staged=27,
            nwor_total_committed=15,
            nwor_total_rejected=12,
            nwor_acceptance_rate=15 / 27,
            # Drafts per request are 3, 5 and 1; accepted 1, 5, 0 in one window, 3, 5, 1 in another.
            nwor_drafted_per_position=[9, 6, 6, 3, 3],
            nwor_accepted_per_position=[5, 3, 3, 2, 2],
            nwor_acceptance_rate_per_position=[5 / 9, 1 / 2, 1 / 2, 2 / 3, 2 / 3],
            nwor_fallback_count=0,
            nwor_scv_vectorised=0 if scv == "off" else 3,
            nwor_error_windows=0,
            nwor_unique_tokens=0,
            nwor_stage_operations=27 * 3,
            nwor_certain_rows=33,
            nwor_cache_bytes=(33 + 15) * ROW,
            nwor_staging_bytes_moved=(27 + 15) * ROW,
            nwor_direct_bytes=(33 + 27) * ROW,
        )


def test_the_names_are_those_that_users_know() -> None:
    assert set(Metrics.model_fields) == NAMES


def test_unique_tokens_are_the_rows_that_the_window_holds_now() -> None:
    with rig(layers=3) as r:
        assert r.window.metrics().nwor_unique_tokens == 0
        r.begin()
        assert r.window.metrics().nwor_unique_tokens == 9
        r.forward()
        assert r.window.metrics().nwor_unique_tokens == 9
        r.commit(SOME)
        assert r.window.metrics().nwor_unique_tokens == 0
        r.begin()
        r.window.abort()
        assert r.window.metrics().nwor_unique_tokens == 0


def test_direct_mode_counts_every_row_as_written() -> None:
    with rig(layers=3, mode="off") as r:
        before = r.rows()
        result = r.run(SOME)
        assert result.accepted.tolist() == SOME
        assert r.holds(r.expected(before, ALL))
        metrics = r.window.metrics()
        assert metrics.nwor_certain_rows == 20
        assert metrics.nwor_cache_bytes == metrics.nwor_direct_bytes == 20 * ROW
        assert (metrics.nwor_total_staged, metrics.nwor_staging_bytes_moved) == (0, 0)


def test_the_bytes_written_directly_equal_those_of_a_direct_run() -> None:
    totals = {}
    for mode in ("off", "stage"):
        with rig(layers=3, mode=mode) as r:
            three_windows(r)
            totals[mode] = r.window.metrics()
    assert totals["stage"].nwor_direct_bytes == totals["off"].nwor_cache_bytes


def test_bytes_follow_the_cache_dtype_and_every_geometry() -> None:
    import torch

    geometries = (
        Geometry("nhd", torch.bfloat16, "fp8_e4m3"),
        Geometry("nhd", torch.bfloat16, "fp8_e4m3", head_size=16),
    )
    with rig(layers=2, geometries=geometries) as r:
        row = 2 * 2 * 2 * (8 + 16)
        assert r.window.row_bytes == row
        r.run(SOME)
        assert r.window.metrics().nwor_cache_bytes == (11 + 6) * row


def test_error_windows_count_once_and_reject_their_drafts() -> None:
    with rig(layers=3) as r:
        r.run(SOME)
        r.begin()
        r.forward(skip=[2])
        r.commit(ALL)
        metrics = r.window.metrics()
        assert metrics.nwor_error_windows == 1
        assert (metrics.nwor_total_staged, metrics.nwor_total_rejected) == (18, 12)
        assert metrics.nwor_total_committed == 6


def test_an_aborted_window_is_in_no_row_counter() -> None:
    with rig() as r:
        r.begin()
        r.forward()
        r.window.abort()
        metrics = r.window.metrics()
        assert metrics.nwor_windows == metrics.nwor_total_staged == 0
        assert metrics.nwor_certain_rows == 11  # these were written


def test_padding_is_no_row() -> None:
    counted = []
    for padding in (0, 7):
        with rig(padding=padding) as r:
            r.run(SOME)
            counted.append(r.window.metrics())
    assert counted[0] == counted[1]


# Prometheus ------------------------------------------------------------------------------------


def scrape(r: Rig) -> str:
    registry = CollectorRegistry()
    registry.register(NworCollector(r.window))
    return generate_latest(registry).decode()


def test_prometheus_serves_every_metric_under_its_own_name() -> None:
    """A prometheus_client counter would be served as nwor_total_staged_total."""
    with rig(layers=3) as r:
        three_windows(r)
        text, metrics = scrape(r), r.window.metrics().model_dump()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert set(families) == NAMES
    for name, value in metrics.items():
        samples = families[name].samples
        assert {sample.name for sample in samples} == {name}
        if isinstance(value, list):
            assert [sample.labels for sample in samples] == [{"position": str(k)} for k in range(5)]
            assert [sample.value for sample in samples] == value
        else:
            assert [sample.value for sample in samples] == [value]
    assert "_total " not in text
    assert "\nnwor_total_staged 27.0\n" in text


def test_prometheus_tells_gauges_apart() -> None:
    with rig() as r:
        families = {f.name: f.type for f in text_string_to_metric_families(scrape(r))}
    assert families["nwor_unique_tokens"] == "gauge"
    assert families["nwor_acceptance_rate"] == "gauge"
    assert families["nwor_acceptance_rate_per_position"] == "gauge"
    assert families["nwor_total_staged"] == "unknown"


def test_the_openmetrics_form_has_the_same_names() -> None:
    with rig() as r:
        r.run(SOME)
        registry = CollectorRegistry()
        registry.register(NworCollector(r.window))
        text = generate_openmetrics(registry).decode()
    assert "\nnwor_total_committed 6.0\n" in text
    assert "\nnwor_unique_tokens 0.0\n" in text


def test_a_scrape_sees_the_counters_of_its_moment() -> None:
    with rig() as r:
        registry = CollectorRegistry()
        registry.register(NworCollector(r.window))
        r.run(SOME)
        first = registry.get_sample_value("nwor_total_staged")
        r.begin()
        assert registry.get_sample_value("nwor_unique_tokens") == 9
        r.window.abort()
        r.run(SOME)
        assert (first, registry.get_sample_value("nwor_total_staged")) == (9, 18)
