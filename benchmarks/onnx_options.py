"""What onnxruntime's session options are worth to the onnxruntime backend, each in processes of its own. Run by hand:

    python benchmarks/onnx_options.py 2b-int8.artifact --rounds 2

One picture of 504 x 728, a short question, 33 new tokens; medians. docs/ONNX.md holds what was found.
"""

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from onnx_speed import peak_gb, request_picture

NEW_TOKENS = 33
CONFIG = {
    "no spinning": {"session.intra_op.allow_spinning": "0"},
    "denormals are zero": {"session.set_denormal_as_zero": "1"},
    "dynamic blocks": {"session.dynamic_block_base": "4"},
}
OPTIONS = ("as it is", "no arena", "no memory pattern", "basic optimizations", *CONFIG)


def _measure(artifact: Path, option: str) -> dict[str, float]:
    from qwen2vl_tc.runtime import load
    from qwen2vl_tc.runtime.backends import onnxruntime as backend

    plain = backend.session_options

    def changed(runtime: Any) -> Any:
        options = plain(runtime)
        if option == "no arena":
            options.enable_cpu_mem_arena = False
        elif option == "no memory pattern":
            options.enable_mem_pattern = False
        elif option == "basic optimizations":
            options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        for key, value in CONFIG.get(option, {}).items():
            options.add_session_config_entry(key, value)
        return options

    backend.session_options = changed
    model = load(artifact, "onnxruntime")
    content = [{"type": "image", "image": request_picture()}, {"type": "text", "text": "What is this?"}]
    at: list[float] = []
    made = model.generate(
        [{"role": "user", "content": content}],
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        ignore_eos=True,
        on_token=lambda token: at.append(time.perf_counter()),
    )
    return {
        "load": sum(model.load_ms.values()),
        "visual": made.timings_ms["visual"],
        "prefill": made.timings_ms["prefill"],
        "decode": median((b - a) * 1e3 for a, b in itertools.pairwise(at)),
        "peak_gb": peak_gb(),
    }


def main(
    artifact: Annotated[Path, typer.Argument(help="An artifact compiled with --mode onnx.")],
    rounds: Annotated[int, typer.Option(help="How often each option is measured.")] = 2,
    # how this script calls itself
    option: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    if option:
        print(json.dumps(_measure(artifact, option)))
        return
    runs_of: dict[str, list[dict[str, float]]] = {name: [] for name in OPTIONS}
    for _ in range(rounds):
        for name in OPTIONS:
            command = [sys.executable, __file__, str(artifact), "--option", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs_of[name].append(json.loads(done.stdout.splitlines()[-1]))
    print("| option | load, ms | ViT, ms | prefill, ms | decode, ms a token | peak memory, GB |")
    print("|---|---|---|---|---|---|")
    for name, runs in runs_of.items():
        middle = {key: median(run[key] for run in runs) for key in runs[0]}
        print(
            f"| {name} | {middle['load']:.0f} | {middle['visual']:.0f} | {middle['prefill']:.0f} | "
            f"{middle['decode']:.1f} | {middle['peak_gb']:.2f} |"
        )


if __name__ == "__main__":
    typer.run(main)
