"""What each optimisation of the graphs is worth, measured on emitted GE graphs. Run by hand, a few minutes:

    python benchmarks/ablation.py                  # the 7B shape, bf16, batch 1, max_length 8192; a Markdown table
    python benchmarks/ablation.py --full           # traces every layer of every variant; a quarter of an hour or more
    python benchmarks/ablation.py --json           # the same as data
    python benchmarks/ablation.py --only swiglu    # variants whose name contains this

For every optimisation the modules are built with only that one undone, traced with the real torchair and compared
with ours: live device operators, transposes of a weight, shape operators, and the bytes that all device operators read
and write (see ablation_cost.py for how they are counted). It needs no weights and no NPU, and says nothing about time:
no device runs anything here.

All layers of a graph are alike, so every count is affine in their number. Each graph is traced at 2, 3 and 4 layers of
full width; the three must lie on a line, or the script stops, and the line gives the full depth.
"""

import copy
import functools
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from qwen2vl_tc.artifacts.config import ModelConfig, model_config_from_hf
from qwen2vl_tc.artifacts.process import prepare_process
from qwen2vl_tc.toolchain.synthetic import published, tiny_config

prepare_process()

import torch  # noqa: E402  # only after the process is prepared
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

MAX_LENGTH = 8192
# max_pixels of the published processor, 12,845,056, in patches of 14 x 14
LARGEST_PICTURE = 65536


@dataclass(frozen=True)
class Row:
    """A variant less ours, one graph: positive is what ours saves; `types` are the operators that differ."""

    variant: str
    undone: str
    graph: str
    device: int
    transpose_weight: int
    shape: int
    file_ops: int
    bytes: int
    matmul_flops: int
    types: dict[str, int]


def open_emulated_device() -> None:
    from qwen2vl_tc.artifacts.soc import DEFAULT_SOC
    from qwen2vl_tc.exporters.torchair.device import open_device

    open_device(DEFAULT_SOC)


DEPTHS = (2, 3, 4)


class NotAffine(Exception):
    """A count that does not grow by the same amount with every layer."""


def _line(values: list[int], depths: tuple[int, ...], depth: int, what: str) -> int:
    """The value at `depth` of the line through `values` at the consecutive `depths`."""
    steps = {after - before for before, after in itertools.pairwise(values)}
    if len(steps) > 1:
        raise NotAffine(f"{what}: {values} at {depths} layers are on no line")
    return values[0] + (depth - depths[0]) * (steps.pop() if steps else 0)


_ADDED = ("device", "transpose_weight", "shape", "layout", "file_ops", "file_device", "bytes", "matmul_flops")


class Ablation:
    """Our graphs of one model and the variants to compare them with. The device must be open."""

    def __init__(
        self,
        config: ModelConfig,
        max_length: int = MAX_LENGTH,
        full: bool = False,
        graphs: tuple[str, ...] | None = None,
    ) -> None:
        import ablation_cost
        import ablation_variants

        self.variants, self.cost = ablation_variants, ablation_cost
        self.config, self.max_length, self.full = config, max_length, full
        base = ablation_variants.BASE
        self.base = replace(base, graphs=graphs or base.graphs)
        self._raw: dict[tuple[str, int], Any] = {}

    @functools.cached_property
    def ours(self) -> dict[str, Any]:
        return self.costs(self.base)

    def _depth(self, graph: str) -> int:
        return self.config.vision.depth if graph == "visual" else self.config.text.num_layers

    def _shallow(self, layers: int) -> ModelConfig:
        text, vision = self.config.text, self.config.vision
        return replace(self.config, text=replace(text, num_layers=layers), vision=replace(vision, depth=layers))

    def traced(self, variant: Any, name: str, layers: int) -> Any:
        """(ModelDef, Binding) before passes. A variant that differs from ours in passes alone is not traced again."""
        same = not (variant.patches or variant.change) and variant.form == self.base.form
        if same and (name, layers) in self._raw:
            return self._raw[name, layers]
        one = replace(variant, passes=(), graphs=(name,))
        found = self.variants.trace_variant(one, self._shallow(layers), self.max_length, torch.bfloat16)[name]
        if same:
            self._raw[name, layers] = found
        return found

    def costs(self, variant: Any, patches: int | None = None) -> dict[str, Any]:
        """What one run of each of the variant's graphs costs at full depth."""
        found = {}
        for name in variant.graphs:
            depth = self._depth(name)
            depths = (depth,) if self.full else DEPTHS
            measured = [self._measure(self.traced(variant, name, n), variant.passes, patches) for n in depths]
            lines = {
                key: _line([getattr(cost, key) for cost in measured], depths, depth, f"{variant.name}, {name}, {key}")
                for key in _ADDED
            }
            types = {
                kind: _line([cost.by_type.get(kind, 0) for cost in measured], depths, depth, f"{variant.name}, {kind}")
                for kind in sorted(set().union(*(cost.by_type for cost in measured)))
            }
            found[name] = replace(measured[-1], **lines, by_type=types)
        return found

    def _measure(self, graph: Any, passes: tuple[str, ...], patches: int | None) -> Any:
        from qwen2vl_tc.exporters.torchair.passes import run_passes

        model = copy.deepcopy(graph[0])
        run_passes(model.graph[0], passes)
        sizes = self.cost.Sizes() if patches is None else self.cost.Sizes(patches=patches)
        return self.cost.measure(model, graph[1], sizes)

    def rows(self, variant: Any) -> Iterator[Row]:
        concerned = replace(variant, graphs=tuple(name for name in variant.graphs if name in self.base.graphs))
        for name, other in self.costs(concerned).items():
            ours = self.ours[name]
            yield Row(
                variant=variant.name,
                undone=variant.undone,
                graph=name,
                device=other.device - ours.device,
                transpose_weight=other.transpose_weight - ours.transpose_weight,
                shape=other.shape - ours.shape,
                file_ops=other.file_ops - ours.file_ops,
                bytes=other.bytes - ours.bytes,
                matmul_flops=other.matmul_flops - ours.matmul_flops,
                types=_difference(other.by_type, ours.by_type),
            )

    def largest_picture(self) -> dict[str, int]:
        """Bytes of the largest tensor but weights, and of all traffic, with LARGEST_PICTURE patches."""
        tnd = replace(self.base, graphs=("visual",))
        forms = {"tnd": tnd, "masked": replace(tnd, form=self.variants.MASKED)}
        found = {name: self.costs(variant, LARGEST_PICTURE)["visual"] for name, variant in forms.items()}
        return {f"{name}_{key}": getattr(c, key) for name, c in found.items() for key in ("largest_bytes", "bytes")}


def _difference(other: dict[str, int], ours: dict[str, int]) -> dict[str, int]:
    kinds = sorted({*other, *ours} - {"Data", "Const"})
    return {kind: other.get(kind, 0) - ours.get(kind, 0) for kind in kinds if other.get(kind, 0) != ours.get(kind, 0)}


class _Kernels(TorchDispatchMode):
    """Counts eager operators that are kernels: no views, no allocation."""

    FREE = ("view", "split", "select", "slice", "unsqueeze", "empty", "detach", "alias", "t")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not name.startswith("_unsafe_view") and name.rstrip("_") not in self.FREE and "split" not in name:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def host_operators() -> dict[str, int]:
    """Eager device operators a token if the host did what decode's graph does before and after the layers."""
    from ablation_text import HostLoopModel

    from qwen2vl_tc.toolchain.graphs.form import Form

    config = model_config_from_hf(tiny_config())
    with torch.device("meta"), torch.inference_mode():
        model = HostLoopModel(config, 256, Form())
        one = torch.zeros(1, dtype=torch.int64)
        logits = torch.zeros(1, config.text.vocab_size)
        with _Kernels() as kernels:
            model.before(one, one)
            model.after(logits, one, one)
    return dict(kernels.counts)


def markdown(rows: list[Row], changes: str) -> Iterator[str]:
    counted = ("device ops", "weight transposes", "shape ops", "ops in file", "MB", "GFLOP")
    columns = ("optimisation", changes, "graph", *counted, "operators")
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for row in rows:
        types = ", ".join(f"{kind} {count:+d}" for kind, count in row.types.items())
        graph = row.graph.partition("_")[0]
        yield (
            f"| {row.variant} | {row.undone} | {graph} | {row.device:+d} | {row.transpose_weight:+d} | {row.shape:+d} "
            f"| {row.file_ops:+d} | {row.bytes / 1e6:+,.1f} | {row.matmul_flops / 1e9:+,.0f} | {types} |"
        )


def main(
    config: Annotated[Path | None, typer.Option(help="A config.json; default: the published 7B shape.")] = None,
    only: Annotated[str, typer.Option(help="Only variants whose name contains this.")] = "",
    full: Annotated[bool, typer.Option(help="Trace every layer.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print data in place of Markdown.")] = False,
) -> None:
    open_emulated_device()
    shape = model_config_from_hf(json.loads(config.read_text()) if config else published("7b"))
    ablation = Ablation(shape, full=full)
    tables: dict[str, list[Row]] = {}
    for title, variants in (("undone", ablation.variants.UNDONE), ("tried", ablation.variants.TRIED)):
        tables[title] = []
        for variant in variants:
            if only in variant.name:
                print(f"{variant.name} ...", file=sys.stderr)
                tables[title] += ablation.rows(variant)
    largest, host = ablation.largest_picture(), host_operators()
    if as_json:
        data = {title: [asdict(row) for row in rows] for title, rows in tables.items()}
        ours = {name: asdict(cost) for name, cost in ablation.ours.items()}
        print(json.dumps({"ours": ours, **data, "largest_picture": largest, "host_operators": host}, indent=1))
        return
    for name, cost in ablation.ours.items():
        print(
            f"ours, {name}: {cost.device} device ops, {cost.bytes / 1e9:,.2f} GB, {cost.matmul_flops / 1e9:,.0f} GFLOP"
        )
    print("\nUndone, less ours (positive: what ours saves):\n")
    print("\n".join(markdown(tables["undone"], "undone: instead")))
    print("\nTried, less ours (negative: what it would save):\n")
    print("\n".join(markdown(tables["tried"], "how")))
    print(f"\n{LARGEST_PICTURE} patches: " + ", ".join(f"{k} {v / 1e9:,.2f} GB" for k, v in largest.items()))
    print(f"eager operators a token without the loop in the graph: {sum(host.values())} ({host})")


if __name__ == "__main__":
    typer.run(main)
