"""What must hold for the demo to pass, each with its figures."""

from __future__ import annotations

from nwor_compile.demo.result import Check, DemoResult, Scenario


def all_checks(result: DemoResult) -> list[Check]:
    """Every check of a finished run."""
    checks = [check for scenario in result.scenarios for check in _scenario(scenario, result)]
    plain = result.plain.audit
    checks.append(
        Check(
            name="cache audit, plain decoding",
            ok=plain.clean and plain.checked_rows > 0,
            detail=plain.model_dump_json(),
        )
    )
    checks.append(_conclusive(result))
    if not result.compiled.eager:
        checks += _compiled(result)
    return checks


def _conclusive(result: DemoResult) -> Check:
    """A run in which all drafts meet one fate shows nothing."""
    accepted = sum(sum(s.staged.accepted_per_position) for s in result.scenarios)
    rejected = sum(s.staged.audit.rejected_offered for s in result.scenarios)
    return Check(
        name="some drafts were accepted and some rejected",
        ok=accepted > 0 and rejected > 0,
        detail=f"{accepted} accepted, {rejected} rejected; more --max-new-tokens give more of both",
    )


def _scenario(scenario: Scenario, result: DemoResult) -> list[Check]:
    direct, staged, name = scenario.direct, scenario.staged, scenario.name
    metrics = staged.metrics
    checks = [
        Check(
            name=f"{name}: token ids equal",
            ok=direct.tokens == staged.tokens and staged.emitted > 0,
            detail=f"{direct.emitted} direct, {staged.emitted} staged",
        ),
        Check(
            name=f"{name}: acceptance equal at every position",
            ok=direct.accepted_per_position == staged.accepted_per_position
            and direct.drafted_per_position == staged.drafted_per_position,
            detail=f"{direct.accepted_per_position} direct, {staged.accepted_per_position} staged",
        ),
        Check(
            name=f"{name}: no rejected row in the staged cache, and it is the recomputed one",
            ok=staged.audit.clean and staged.audit.checked_rows > 0,
            detail=staged.audit.model_dump_json(),
        ),
        Check(
            name=f"{name}: the audit sees the rejected rows of direct writes",
            ok=direct.audit.rejected_rows == direct.audit.rejected_offered
            and direct.audit.wrong_rows == 0,
            detail=f"{direct.audit.rejected_rows} of {direct.audit.rejected_offered} rejected rows",
        ),
        Check(
            name=f"{name}: counters agree with the cache",
            ok=metrics is not None
            and direct.counted_rows == direct.audit.rows_written
            and staged.counted_rows == staged.audit.rows_written
            and metrics.nwor_cache_bytes == staged.cache_bytes
            and metrics.nwor_total_rejected == staged.audit.rejected_offered
            and metrics.nwor_staging_bytes_moved == staged.staging_bytes,
            detail=f"direct {direct.counted_rows} counted, {direct.audit.rows_written} found; "
            f"staged {staged.counted_rows} counted, {staged.audit.rows_written} found",
        ),
        Check(
            name=f"{name}: no fallback",
            ok=direct.fallbacks == 0 and staged.fallbacks == 0,
            detail=f"{direct.fallbacks} direct, {staged.fallbacks} staged",
        ),
    ]
    if scenario.temperature == 0:
        checks.append(
            Check(
                name=f"{name}: token ids equal decoding without speculation",
                ok=staged.tokens == result.plain.tokens,
                detail=f"{result.plain.emitted} plain, {staged.emitted} staged",
            )
        )
    return checks


def _compiled(result: DemoResult) -> list[Check]:
    rewrite, compiled = result.rewrite, result.compiled
    return [
        Check(
            name="the pass rewrote every write and reader of the target",
            ok=rewrite.writes_rewritten > 0
            and rewrite.writes_rewritten == rewrite.readers_rewritten
            and not rewrite.refused,
            detail=f"{rewrite.writes_rewritten} writes, {rewrite.readers_rewritten} readers, "
            f"refused {rewrite.refused}",
        ),
        Check(
            name="the compiled graph staged",
            ok=compiled.staged_executions > 0,
            detail=f"{compiled.staged_executions} executions",
        ),
        Check(
            name="one graph a model, no recompile",
            ok=compiled.recompiles == 0,
            detail=f"{compiled.target_graphs} target, {compiled.draft_graphs} draft",
        ),
    ]
