"""Where a request's time goes in the onnxruntime backend, by operator: for an artifact with ONNX models. Run by hand:

    python benchmarks/onnx_profile.py 2b-int8.artifact

One picture of 504 x 728, a short question, 17 new tokens, as benchmarks/onnx_speed.py asks. onnxruntime's own profiler
times the operators; it costs little, so the sums come close to the unprofiled times.
"""

import collections
import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from onnx_speed import request_picture

NEW_TOKENS = 17
SHOWN = 8


def _operators(file: str) -> list[tuple[float, dict[str, float]]]:
    """Of every run of a session: its milliseconds, and those of its operators by type."""
    events = [event for event in json.loads(Path(file).read_text()) if event["cat"] in ("Session", "Node")]
    runs: list[tuple[float, float, collections.Counter[str]]] = [
        (event["ts"], event["dur"], collections.Counter()) for event in events if event["name"] == "model_run"
    ]
    runs.sort(key=lambda run: run[0])
    for event in events:
        if not event["name"].endswith("_kernel_time"):
            continue
        for begin, length, types in runs:
            if begin <= event["ts"] <= begin + length:
                types[event["args"]["op_name"]] += event["dur"] / 1e3
    return [(length / 1e3, dict(types)) for _, length, types in runs]


def _show(name: str, runs: list[tuple[float, dict[str, float]]]) -> None:
    whole = median(length for length, _ in runs)
    print(f"{name}: {whole:.1f} ms (median of {len(runs)})")
    types = {key for _, times in runs for key in times}
    middles = {key: median(times.get(key, 0.0) for _, times in runs) for key in types}
    for key, value in sorted(middles.items(), key=lambda item: -item[1])[:SHOWN]:
        print(f"  {key:<34}{value:9.2f} ms {value / whole:7.1%}")
    print(f"  {'between operators':<34}{whole - sum(middles.values()):9.2f} ms")


def main(artifact: Annotated[Path, typer.Argument(help="An artifact compiled with --mode onnx.")]) -> None:
    from qwen2vl_tc.runtime import load
    from qwen2vl_tc.runtime.backends import onnxruntime as backend

    plain = backend.session_options
    with tempfile.TemporaryDirectory() as folder:

        def profiled(runtime: Any) -> Any:
            options = plain(runtime)
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder, "profile"))
            return options

        backend.session_options = profiled
        model = load(artifact, "onnxruntime")
        print("load, ms:", ", ".join(f"{name} {value:.0f}" for name, value in model.load_ms.items()))
        content = [{"type": "image", "image": request_picture()}, {"type": "text", "text": "What is this?"}]
        model.generate(
            [{"role": "user", "content": content}], max_new_tokens=NEW_TOKENS, do_sample=False, ignore_eos=True
        )
        engine: Any = model.backend
        _show("visual", _operators(engine._visual.end_profiling()))
        text = _operators(engine._text.end_profiling())
        _show("prefill", text[:1])
        _show("decode", text[1:])


if __name__ == "__main__":
    typer.run(main)
