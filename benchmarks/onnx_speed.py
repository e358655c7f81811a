"""Speed and memory of the onnxruntime backend against transformers in fp32, each in a process of its own, in one run.

    python benchmarks/onnx_speed.py                      # 2B shape, random weights, int8 and int4
    python benchmarks/onnx_speed.py --size tiny          # a minute, to see that it works

One picture of 504 x 728 (1872 patches), 507 prompt tokens, 17 new ones, warm page cache. Runs alternate; medians. The
times are ratios to transformers' in the same run: a machine's own milliseconds say little about another.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

NEW_TOKENS = 17
SIZE = (728, 504)
QUESTION = "What is in the picture? Say it in one 0123456789"  # makes 507 tokens
FIGURES = {
    "decode": "decode, ms a token",
    "first": "ViT and prefill, ms",
    "start": "start to first token, ms",
    "peak": "peak memory, GB",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="2b", help="tiny, 2b or 7b")
    parser.add_argument("--weights", default="int8,int4", help="kinds of weights to measure")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, help="keeps what is made here, and uses what is there")
    parser.add_argument("--no-transformers", action="store_true", help="only ours, without ratios")
    # how this script calls itself
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        engine, path = options.child
        print(json.dumps((_transformers if engine == "transformers" else _ours)(Path(path), options.threads)))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        source = _checkpoint(work, options.size)
        engines = {} if options.no_transformers else {"transformers": source}
        for weights in options.weights.split(","):
            engines[weights] = _artifact(work, source, options.size, weights)
        runs_of: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
        for _ in range(options.runs):
            for name, path in engines.items():
                runs_of[name].append(_child(name, path, options.threads))
        _report(runs_of, engines, options.threads)


def _checkpoint(work: Path, size: str) -> Path:
    from common import published, tiny_config, write_checkpoint

    folder = work / f"hf-{size}"
    if not folder.is_dir():
        write_checkpoint(folder, tiny_config() if size == "tiny" else published(size), tokenizer=True)
    return folder


def _artifact(work: Path, source: Path, size: str, weights: str) -> Path:
    out = work / f"{size}-{weights}.artifact"
    if not out.is_dir():
        command = [str(Path(sys.executable).parent / "qwen2vl-tc")]
        subprocess.run([*command, "convert", "--src", source, "--out", out], check=True, stdout=sys.stderr)
        words = ["--mode", "onnx", "--weights", weights, "--max-length", "1024"]
        subprocess.run([*command, "compile", out, *words], check=True, stdout=sys.stderr)
    return out


def _child(name: str, path: Path, threads: int) -> dict[str, float]:
    for file in path.rglob("*"):
        if file.is_file() and file.stat().st_size:
            with open(file, "rb") as opened:
                while opened.read(1 << 24):
                    pass
    words = [sys.executable, __file__, "--threads", str(threads), "--child", name, str(path)]
    begin = time.perf_counter()
    environment = {**os.environ, "QWEN2VL_TC_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    # both clocks are CLOCK_MONOTONIC
    result["start"] = (result.pop("first_at") - begin) * 1e3
    return result


def request_picture() -> Any:
    from qwen2vl_tc.toolchain.verify.cases import picture

    return picture(*SIZE, seed=1)


def _text() -> str:
    return f"<|vision_start|><|image_pad|><|vision_end|>{QUESTION}"


def peak_gb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e9
    raise SystemExit("no VmHWM in /proc/self/status")


def _ours(path: Path, threads: int) -> dict[str, float]:
    from qwen2vl_tc.runtime import load

    model = load(path, backend="onnxruntime")
    picture = request_picture()
    at: list[float] = []
    reply = model.generate(
        _text(),
        [picture],
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        on_token=lambda token: at.append(time.perf_counter()),
    )
    assert len(reply.prompt_token_ids) == 507, len(reply.prompt_token_ids)
    timings = reply.timings_ms
    first = timings["visual"] + timings["prefill"]
    made = {**_steps(at), "first": first, "peak": peak_gb(), "visual": timings["visual"]}
    # at once, and after the peak was taken: a virtual machine's share of the memory changes within seconds
    return {**made, "bandwidth": _bandwidth(threads)}


def _steps(at: list[float]) -> dict[str, float]:
    """The first token's time, and the median of the steps after it."""
    return {
        "first_at": at[0],
        "decode": statistics.median((b - a) * 1e3 for a, b in itertools.pairwise(at)),
    }


def _transformers(path: Path, threads: int) -> dict[str, float]:
    from qwen2vl_tc.toolchain.verify.transformers_import import import_transformers

    import_transformers()
    import torch
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    torch.set_num_threads(threads)
    model = Qwen2VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()
    made = Qwen2VLImageProcessorPil.from_pretrained(path)(images=[request_picture()], return_tensors="pt")
    merged = int(made["image_grid_thw"].prod()) // 4
    text = _text().replace("<|image_pad|>", "<|image_pad|>" * merged)
    ids = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt")["input_ids"]
    assert ids.shape[1] == 507, ids.shape
    extra: dict[str, Any] = {
        "pixel_values": made["pixel_values"],
        "image_grid_thw": made["image_grid_thw"],
        "mm_token_type_ids": (ids == model.config.image_token_id).int(),
    }
    at: list[float] = []
    cache, begin = None, time.perf_counter()
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **extra)
            cache, extra = out.past_key_values, {}
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            ids.item()
            at.append(time.perf_counter())
    return {**_steps(at), "first": (at[0] - begin) * 1e3, "peak": peak_gb()}


def _bandwidth(threads: int) -> float:
    """Bytes a second that `threads` threads read, the median of 9 times, from arrays far larger than the caches."""
    import numpy as np

    arrays = [np.ones(1 << 27, np.float32) for _ in range(threads)]
    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(9):
            begin = time.perf_counter()
            list(pool.map(lambda array: float(array.max()), arrays))
            rates.append(sum(array.nbytes for array in arrays) / (time.perf_counter() - begin))
    return statistics.median(rates)


def _report(runs_of: dict[str, list[dict[str, float]]], engines: dict[str, Path], threads: int) -> None:
    middle = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in runs_of.items()
    }
    base = middle.get("transformers")
    print(
        f"{threads} threads, {len(next(iter(runs_of.values())))} runs, medians; in brackets: ratio to transformers fp32"
    )
    print("| engine | " + " | ".join(FIGURES.values()) + " |\n|---|" + "---|" * len(FIGURES))
    for name, values in middle.items():
        cells = []
        for key in FIGURES:
            text = f"{values[key]:.2f}" if key == "peak" else f"{values[key]:.0f}"
            if base and name != "transformers":
                ratio = values[key] / base[key] if key == "peak" else base[key] / values[key]
                text += f" ({ratio:.2f})"
            cells.append(text)
        print(f"| {name} | " + " | ".join(cells) + " |")
    for name, values in middle.items():
        if name != "transformers":
            from qwen2vl_tc.artifacts.store import read_manifest

            part = read_manifest(engines[name]).onnx
            assert part is not None
            text = next(graph.data.bytes for graph in part.graphs if graph.name == "text")
            shares = [text / (run["decode"] / 1e3) / run["bandwidth"] for run in runs_of[name]]
            read = ", ".join(f"{run['bandwidth'] / 1e9:.0f}" for run in runs_of[name])
            print(
                f"{name}: vision {values['visual']:.0f} ms; decode reads {text / 1e9:.2f} GB a token, "
                f"{statistics.median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%}) of what these threads read "
                f"right after it: {read} GB/s"
            )


if __name__ == "__main__":
    main()
