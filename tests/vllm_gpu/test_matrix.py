"""The matrix without a GPU: its audit on CPU tensors, its cases, and its driver with stand-in
engines."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import matrix
import matrix_engine
import matrix_models
import matrix_report
import matrix_weights
import pytest
import torch
from matrix_cases import CASES, EQUAL_TO, Case
from row_audit import AuditedLayer, RowAudit, rows_of
from torch import Tensor

BLOCKS, BLOCK, HEADS, SIZE = 6, 4, 2, 8


def cache(dtype: torch.dtype = torch.bfloat16, blocks: int = BLOCKS) -> Tensor:
    """Packed, as FLASH_ATTN has it in NHD memory: logically `[blocks, heads, block, 2 * D]`."""
    return torch.zeros(blocks, BLOCK, HEADS, 2 * SIZE, dtype=dtype).transpose(1, 2)


def layer(name: str, raw: Tensor, group: int = 0, **more: Any) -> AuditedLayer:
    return AuditedLayer(name, group, rows_of(raw), BLOCK, **more)


def write(raw: Tensor, slots: list[int]) -> None:
    rows = rows_of(raw)
    for slot in slots:
        rows[slot // BLOCK, slot % BLOCK] = 17


# One request whose five tokens are a certain one and four drafts, two of them accepted.
SLOTS, STARTS, DRAFTS, ACCEPTED = [5, 6, 7, 12, 13], [0, 5], [4], [2]


def audit(raw: Tensor, written: list[int], **more: Any) -> dict[str, int]:
    rows = RowAudit([layer("a", raw, **more)], BLOCKS)
    rows.before({0: torch.tensor(SLOTS)})
    write(raw, written)
    rows.after(STARTS, DRAFTS, ACCEPTED)
    return dict(rows.totals)


@pytest.mark.parametrize(
    ("raw", "dtype"),
    [
        (cache(), None),
        (cache(torch.float16), None),
        (cache(torch.uint8), torch.float8_e4m3fn),
        (cache(torch.uint8), torch.float8_e5m2),
        (torch.zeros(BLOCKS, HEADS, BLOCK, 2 * SIZE), None),  # HND memory
        (torch.zeros(2, BLOCKS, BLOCK, HEADS, SIZE), None),
        (torch.zeros(BLOCKS, 2, BLOCK, HEADS, SIZE), None),
        (torch.zeros(BLOCKS, BLOCK, 3 * SIZE), None),
    ],
)
def test_the_audit_tells_staged_writes_from_direct_ones(
    raw: Tensor, dtype: torch.dtype | None
) -> None:
    staged = audit(raw.clone(memory_format=torch.preserve_format), SLOTS[:3], dtype=dtype)
    direct = audit(raw.clone(memory_format=torch.preserve_format), SLOTS, dtype=dtype)
    assert (staged["rejected_present"], staged["missing"], staged["unexpected"]) == (0, 0, 0)
    assert (direct["rejected_present"], direct["missing"], direct["unexpected"]) == (2, 0, 0)
    assert staged["decode_tokens"] == staged["decode_rows"] == 3
    assert direct["decode_rows"] == 5


def test_the_audit_sees_missing_and_stray_rows() -> None:
    found = audit(cache(), [5, 6, 20])
    assert (found["missing"], found["unexpected"], found["rejected_present"]) == (1, 1, 0)


def test_tail_blocks_are_not_looked_at() -> None:
    raw = cache(blocks=BLOCKS + 2)
    found = audit(raw, [*SLOTS[:3], BLOCKS * BLOCK, BLOCKS * BLOCK + 5])
    assert found["unexpected"] == found["rejected_present"] == 0


def test_groups_that_share_memory_are_judged_by_their_own_slots() -> None:
    raw = cache()
    slots = {0: torch.tensor([4, 5, 6]), 1: torch.tensor([8, 9, 10])}

    def step(written: list[int]) -> dict[str, int]:
        rows = RowAudit([layer("full", raw, 0), layer("sliding", raw, 1)], BLOCKS)
        rows.before(slots)
        write(raw, written)
        rows.after([0, 3], [2], [1])
        return dict(rows.totals)

    staged = step([4, 5, 8, 9])
    assert (staged["rejected_present"], staged["missing"], staged["unexpected"]) == (0, 0, 0)
    assert step([4, 5, 6, 8, 9, 10])["rejected_present"] == 2
    assert step([4, 5, 8, 9, 20])["unexpected"] == 2


def test_cut_blocks_count_in_the_allocators_blocks() -> None:
    """A cache of blocks of 4 under an allocator with blocks of 8: 3 of these are 6 of the cache."""
    raw = cache(blocks=8)
    rows = RowAudit([AuditedLayer("a", 0, rows_of(raw), 2 * BLOCK)], 3)
    rows.before({0: torch.tensor(SLOTS)})
    write(raw, [*SLOTS[:3], 23, 24])  # 23 is the allocator's last, 24 the first tail row
    rows.after(STARTS, DRAFTS, ACCEPTED)
    assert rows.totals["unexpected"] == 1


def test_the_audit_leaves_the_samplers_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    audit(cache(), SLOTS)
    assert torch.equal(torch.rand(4), expected)


def test_weights_keep_the_size_of_what_passes_through() -> None:
    class GemmaRMSNorm(torch.nn.LayerNorm):
        pass

    model = torch.nn.ModuleDict(
        {
            "proj": torch.nn.Linear(256, 128, dtype=torch.bfloat16),
            "input_norm": torch.nn.LayerNorm(256),
            "gemma_norm": GemmaRMSNorm(256),
        }
    )
    matrix_weights.fill(model)
    weights = {name: weight.detach().float() for name, weight in model.named_parameters()}
    assert weights["proj.weight"].std().item() == pytest.approx(1 / 16, rel=0.1)
    assert weights["input_norm.weight"].mean().item() == pytest.approx(1, abs=0.05)
    assert weights["gemma_norm.weight"].mean().item() == pytest.approx(0, abs=0.05)
    matrix_weights.fill(model)
    again = dict(model.named_parameters())["proj.weight"]
    assert torch.equal(weights["proj.weight"], again.float())


@pytest.mark.parametrize("name", list(matrix_models.TARGETS))
def test_configs_load(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for method in ("eagle", "draft_model"):
        for folder in matrix_models.write(name, method, tmp_path / method).values():
            assert folder is not None
            config = transformers.AutoConfig.from_pretrained(folder)
            assert config.vocab_size == matrix_models.VOCABULARY


def test_every_case_says_what_an_engine_needs(tmp_path: Path) -> None:
    for name, case in CASES.items():
        assert case.name == name
        for kind in case.kinds:
            options = case.options(kind, tmp_path / name / kind)
            json.dumps(options)
            assert EQUAL_TO.get(kind, "stock") in (*case.kinds, "stock")
            assert options["speculative"]["num_speculative_tokens"] == case.k
        assert case.expects or "stock" in case.kinds


STAND_IN = """
import json, sys, time
options = json.load(open(sys.argv[1]))
nwor, k = options["nwor"], options["speculative"]["num_speculative_tokens"]
fault = options["llm"].get("fault", "")
staged = nwor is not None and nwor["mode"] == "stage"
if staged and fault == "refused":
    print("ConfigError: NWOR cannot stage: layer x: ALiBi", file=sys.stderr)
    sys.exit(1)
if fault == "stock dies" and nwor is None:
    print("[rank0]: ValueError: no such kernel\\nno more", file=sys.stderr)
    sys.exit(1)
if staged and fault == "hangs":
    time.sleep(600)
print(json.dumps({"runner": "vllm.v1.worker.gpu.model_runner.GPUModelRunner", "blocks": 9,
                  "backend": "FlashAttentionImpl", "start_seconds": 1.0, "groups": 1}), flush=True)
for line in sys.stdin:
    command = json.loads(line)
    ids = [[(7 * i + j) % 50 for j in range(command["max_tokens"])] for i in range(12)]
    if fault == "differs" and staged:
        ids[3][5] = 99
    if fault == "unsteady":
        ids[0][0] = __import__("os").getpid()
    rows = {"steps": 9, "missing": 0, "unexpected": 0, "rejected_present": 0 if staged else 30}
    if staged and fault == "rejected rows":
        rows["rejected_present"] = 2
    print(json.dumps({
        "ids": ids, "accepted_per_position": [5] * k, "drafts": 20, "preemptions": 0,
        "prefix_hits": 1, "rows": rows if command.get("audit") else {}, "graphs": {"FULL": 3},
        "logprobs": [[-1.0] * len(x) for x in ids],
        "nwor": {"nwor_windows": 5, "nwor_total_staged": 80, "nwor_total_committed": 20,
                 "nwor_error_windows": 0, "nwor_fallback_count": 0} if staged else {},
    }), flush=True)
"""


def run(tmp_path: Path, *cases: Case, seconds: float = 200, limit: float = 20) -> matrix.Matrix:
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)

    def start(case: Case, kind: str, left: float) -> dict[str, Any]:
        return matrix_engine.run(case, kind, tmp_path, tmp_path, left, script=script)

    deadline = time.monotonic() + seconds
    found = matrix.Matrix(
        cases, start, deadline=deadline, limit=limit, controls=True, finished=lambda rows: None
    )
    found.run(2)
    return found


def faulty(fault: str, **more: Any) -> Case:
    return Case(name=fault.replace(" ", "_"), llm={"fault": fault}, **more)


def test_equal_engines_are_tested(tmp_path: Path) -> None:
    (row,) = run(tmp_path, Case(name="fine", kinds=("stock", "stage", "nan"))).all_rows()
    assert row["state"] == "tested", row["problems"]
    assert row["kinds"]["stage"]["against"]["stock"]["greedy"]["logprob_difference"] == 0
    assert row["kinds"]["stock"]["rejected_rows"] == 60
    assert "tested on a card" in matrix_report.table({"device": "a card", "rows": [row]})


def test_a_difference_fails_and_is_looked_into(tmp_path: Path) -> None:
    (row,) = run(tmp_path, faulty("differs")).all_rows()
    assert row["state"] == "failed"
    assert "in 1 requests, first at {'request': 3, 'position': 5" in row["problems"][0]
    assert {"stage is unlike off", "stock equals off", "stock equals again"} <= set(row["notes"])


def test_a_vllm_that_differs_from_itself_tests_nothing(tmp_path: Path) -> None:
    (row,) = run(tmp_path, faulty("unsteady")).all_rows()
    assert (row["state"], row["why"]) == ("untested", "stock: two starts give different tokens")


def test_rejected_rows_fail(tmp_path: Path) -> None:
    (row,) = run(tmp_path, faulty("rejected rows")).all_rows()
    assert row["state"] == "failed"
    assert "audit {'rejected_present': 2}" in row["problems"][0]


def test_a_refusal_counts_only_where_it_is_expected(tmp_path: Path) -> None:
    rows = run(
        tmp_path,
        faulty("refused", expects="ALiBi", kinds=("stage",)),
        Case(name="unexpected", llm={"fault": "refused"}),
        Case(name="other", llm={"fault": "refused"}, expects="MLA", kinds=("stage",)),
        Case(name="runs", expects="MLA", kinds=("stage",)),
    ).all_rows()
    assert [row["state"] for row in rows] == ["refused", "failed", "failed", "failed"]
    assert rows[1]["problems"] == ["stage: NWOR cannot stage: layer x: ALiBi"]
    assert "it ran" in rows[3]["problems"][0]


def test_what_stock_cannot_run_is_untested(tmp_path: Path) -> None:
    (row,) = run(tmp_path, faulty("stock dies")).all_rows()
    assert row["state"] == "untested"
    assert row["why"] == "stock: the engine ended: ValueError: no such kernel"


def test_an_engine_that_hangs_is_ended_and_reported(tmp_path: Path) -> None:
    (row,) = run(tmp_path, faulty("hangs"), limit=3).all_rows()
    assert row["state"] == "failed"
    assert row["problems"][0].startswith("stage: no answer in")


def test_what_time_does_not_allow_has_no_row(tmp_path: Path) -> None:
    found = run(tmp_path, Case(name="late"), seconds=matrix.START - 1)
    assert found.all_rows() == []


def test_a_package_that_never_runs_is_given_up(tmp_path: Path) -> None:
    cases = [Case(name=f"case{i}", llm={"fault": "hangs"}) for i in range(40)]
    assert len(run(tmp_path, *cases, limit=1).all_rows()) < 20


def test_an_unknown_case_is_named() -> None:
    with pytest.raises(SystemExit, match="no case fits 'nothing'"):
        matrix.selected(["nothing"])
    assert all(case.name.startswith("tiny.ngram") for case in matrix.selected(["tiny.ngram*"]))
