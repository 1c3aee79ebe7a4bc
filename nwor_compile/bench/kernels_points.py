"""The attention points of `nwor bench kernels`."""

from __future__ import annotations

from dataclasses import dataclass, replace

BLOCK_SIZE = 16
LONGEST = 131072  # what graphs "captured for the maximum" have room for


@dataclass(frozen=True)
class Point:
    """A verify step: `batch` requests of `context` rows whose last `span` tokens are queried."""

    batch: int
    context: int
    span: int = 5
    heads: int = 32
    kv_heads: int = 8
    size: int = 128
    kv_cache_dtype: str = "auto"
    ragged: bool = False  # every second request has a hundredth of the context
    room: int = 0  # context that the graph is captured for; 0: its own

    @property
    def label(self) -> str:
        """Short and unique."""
        parts = [f"{self.batch} x {self.context}"]
        if self.span != 5:
            parts.append(f"span {self.span}")
        if (self.heads, self.kv_heads, self.size) != (32, 8, 128):
            parts.append(f"{self.heads}/{self.kv_heads} heads of {self.size}")
        if self.kv_cache_dtype != "auto":
            parts.append(self.kv_cache_dtype)
        if self.ragged:
            parts.append("ragged")
        if self.room:
            parts.append(f"captured for {self.room}")
        return ", ".join(parts)

    @property
    def lengths(self) -> list[int]:
        """Rows of each request. They end at different rows of a block, as requests do: how many
        rows a tail block shares with the cache depends on it."""
        short = max(self.context // 100, self.span + 1)
        whole = [short if self.ragged and r % 2 else self.context for r in range(self.batch)]
        ends = (7 * r % BLOCK_SIZE for r in range(self.batch))
        return [max(self.span + 1, n - end) for n, end in zip(whole, ends, strict=True)]

    @property
    def row_bytes(self) -> int:
        """K and V of one token of one layer."""
        return 2 * self.kv_heads * self.size * (2 if self.kv_cache_dtype == "auto" else 1)


def points(*, quick: bool) -> dict[str, list[Point]]:
    """Point by group; the quick ones are a few of each."""
    llama = [
        Point(batch, context)
        for batch in (1, 2, 4, 8, 16, 64, 256)
        for context in (512, 1024, 2048, 4096, 8192, 32768, LONGEST)
        if (batch, context) in _LLAMA
    ]
    base = [
        Point(1, 8192), Point(4, 2048), Point(8, 1024), Point(16, 2048), Point(64, 4096),
    ]  # fmt: skip
    spans = [replace(p, span=s) for s in (2, 9, 17, 49) for p in base]
    models = [
        replace(p, heads=heads, kv_heads=kv_heads, size=size)
        for heads, kv_heads, size in _MODELS
        for p in base
    ]  # fmt: skip
    ragged = [replace(Point(b, c), ragged=True) for b in (4, 16, 64, 256) for c in (4096, 32768)]
    graphs = [replace(p, room=LONGEST) for p in (Point(1, 512), Point(4, 2048), Point(16, 2048))]
    fp8 = [
        replace(p, kv_cache_dtype=name)
        for name in ("fp8_e4m3", "fp8_e5m2")
        for p in (Point(16, 2048), Point(64, 4096), Point(256, 2048), Point(1, 32768))
    ]
    groups = {
        "Llama-3-8B": llama, "spans": spans, "other heads": models, "ragged": ragged,
        "captured for the longest": graphs, "fp8": fp8,
    }  # fmt: skip
    if quick:
        few = {(1, 512), (4, 2048), (16, 2048), (64, 4096)}
        groups = {
            name: [p for p in group if (p.batch, p.context) in few][:4] or group[:1]
            for name, group in groups.items()
        }
    return groups


_MODELS = ((24, 8, 128), (64, 8, 128), (32, 32, 128), (32, 8, 64), (32, 1, 128))
_LLAMA = {
    *((1, c) for c in (512, 2048, 8192, 32768, LONGEST)),
    *((4, c) for c in (512, 2048, 8192, 32768, LONGEST)),
    *((2, c) for c in (512, 8192)),
    *((8, c) for c in (512, 1024, 4096)),
    *((16, c) for c in (512, 2048, 8192, 32768, LONGEST)),
    *((64, c) for c in (512, 1024, 4096, 32768, LONGEST)),
    *((256, c) for c in (512, 2048, 8192, 32768, LONGEST)),
}
