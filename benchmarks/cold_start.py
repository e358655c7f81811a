"""From process start to first token: our runtime against transformers, on one checkpoint and one picture. Run by hand:

    python benchmarks/cold_start.py                        # 2B shape, bf16 then fp32; needs 20 GB of disk and of memory
    python benchmarks/cold_start.py --dtype bf16 --rounds 5 --folder /scratch

The checkpoint is random, of the published shape and in bf16, as Qwen2-VL is published. Ours is an artifact of it in the
dtype asked for; transformers loads the checkpoint itself in that dtype, as its users do. Both sides run in processes of
their own, taking turns, so that whatever else the machine does hits both alike; pages are in the page cache. The clock
starts just before a process does. Ends with exit code 1 if a goal is missed: everything before the first operator of
the vision tower, and the time to the first token, the check of every byte of ours included.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from qwen2vl_tc.artifacts.process import prepare_process

SIZE = (728, 504)
PROMPT = "What is this?"
# transformers' time before the vision tower over ours, at least
GOALS = {"fp32": 4.0, "bf16": 2.0}
THEIRS = """
import json, sys, time
begin_ns, folder, dtype, picture, prompt = json.loads(sys.argv[1])
from qwen2vl_tc.toolchain.transformers_import import import_transformers
import_transformers()
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
imported = time.monotonic_ns()
model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype))
tokenizer, pictures = AutoTokenizer.from_pretrained(folder), Qwen2VLImageProcessorPil.from_pretrained(folder)
loaded = time.monotonic_ns()
# what Qwen2VLProcessor does, which needs torchvision for its video half
content = [{"type": "image"}, {"type": "text", "text": prompt}]
chat = [{"role": "user", "content": content}]
text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
made = pictures(images=[Image.open(picture)], return_tensors="pt")
placeholder = tokenizer.convert_ids_to_tokens(model.config.image_token_id)
text = text.replace(placeholder, placeholder * (int(made["image_grid_thw"].prod()) // pictures.merge_size**2))
given = {**tokenizer(text, return_tensors="pt"), **made}
given["mm_token_type_ids"] = (given["input_ids"] == model.config.image_token_id).int()
stamps = []
model.model.visual.register_forward_pre_hook(lambda *_: stamps.append(time.monotonic_ns()))
with torch.inference_mode():
    model.generate(**given, max_new_tokens=1, do_sample=False)
stamps.append(time.monotonic_ns())
milliseconds = lambda stamp: (stamp - begin_ns) / 1e6
print(json.dumps({"before_visual_ms": milliseconds(stamps[0]), "first_token_ms": milliseconds(stamps[1]),
    "imports": milliseconds(imported), "load": (loaded - imported) / 1e6, "tokens": given["input_ids"].shape[1]}))
"""


def _run(command: list[str], request: Any) -> dict[str, Any]:
    done = subprocess.run([*command, json.dumps(request)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def _ours(artifact: Path, picture: Path) -> dict[str, Any]:
    content = [{"type": "image", "image": str(picture)}, {"type": "text", "text": PROMPT}]
    request = {"artifact": str(artifact), "backend": "reference", "execute_mode": "dynamo"}
    messages = [{"role": "user", "content": content}]
    command = [sys.executable, "-m", "qwen2vl_tc.toolchain.first_token"]
    return _run(command, {**request, "messages": messages, "begin_ns": time.monotonic_ns()})


def _theirs(source: Path, dtype: str, picture: Path) -> dict[str, Any]:
    name = {"bf16": "bfloat16", "fp32": "float32"}[dtype]
    return _run([sys.executable, "-c", THEIRS], [time.monotonic_ns(), str(source), name, str(picture), PROMPT])


def _seconds(told: dict[str, Any]) -> str:
    return (
        f"{told['before_visual_ms'] / 1e3:.2f} s before the vision tower, {told['first_token_ms'] / 1e3:.2f} s in all"
    )


def main(
    dtype: Annotated[list[str] | None, typer.Option(help="bf16, fp32; repeat it. Default: both.")] = None,
    size: Annotated[str, typer.Option(help="2b, 7b: the published shape.")] = "2b",
    folder: Annotated[Path | None, typer.Option(help="Where to work; default: the temporary folder.")] = None,
    rounds: Annotated[int, typer.Option(help="How often each side runs.")] = 3,
) -> None:
    prepare_process()
    import numpy as np
    from PIL import Image

    from qwen2vl_tc.toolchain import page_cache
    from qwen2vl_tc.toolchain.compile import CompileOptions, compile_artifact
    from qwen2vl_tc.toolchain.synthetic import published, write_checkpoint
    from qwen2vl_tc.toolchain.weights.convert import convert

    missed = []
    with tempfile.TemporaryDirectory(dir=folder) as work:
        source, picture = Path(work, "hf"), Path(work, "picture.png")
        write_checkpoint(source, published(size), tokenizer=True)
        pixels = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8)
        Image.fromarray(pixels).save(picture)
        for wanted in dtype or ["bf16", "fp32"]:
            artifact = Path(work, wanted)
            convert(source, artifact, wanted, sync=False)
            compile_artifact(artifact, CompileOptions())
            told: dict[str, list[dict[str, Any]]] = {"ours": [], "transformers": []}
            for number in range(rounds):
                # each side starts from its own files in memory: both sides' do not fit beside what runs
                page_cache.warm(path for path in artifact.rglob("*") if path.is_file())
                told["ours"].append(_ours(artifact, picture))
                page_cache.warm(source.iterdir())
                told["transformers"].append(_theirs(source, wanted, picture))
                for name, values in told.items():
                    print(f"{wanted} round {number + 1}, {name}: {_seconds(values[-1])}", flush=True)
            for measure, goal in (("before_visual_ms", GOALS[wanted]), ("first_token_ms", 1.0)):
                ours, theirs = (median(each[measure] for each in told[name]) for name in ("ours", "transformers"))
                ratio = theirs / ours
                print(f"{wanted} {measure}: transformers {theirs:.0f}, ours {ours:.0f}: ratio {ratio:.2f}, goal {goal}")
                if ratio < goal:
                    missed.append(f"{wanted} {measure}")
            last = told["ours"][-1]["phases_ms"]
            print(f"{wanted}, ours, last round, ms: " + ", ".join(f"{name} {ms:.0f}" for name, ms in last.items()))
            theirs_last = told["transformers"][-1]
            print(
                f"{wanted}, transformers, last round, ms: imports {theirs_last['imports']:.0f}, "
                f"load {theirs_last['load']:.0f}, {theirs_last['tokens']} prompt tokens"
            )
    if missed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
