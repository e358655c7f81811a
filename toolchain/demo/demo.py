"""`demo`: with no weights at hand, a tiny trained model goes the whole way, by the commands that a user types."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...artifacts.errors import ToolchainError
from ...artifacts.own import make_own, own_folder
from ..build.build import BuildResult
from ..inspect.inspect import RECIPE_7B, Inspection
from ..words import command
from . import CHECKPOINT as TRAINED
from .pictures import Scene, Thing, description, draw

if TYPE_CHECKING:
    from ...runtime.requests.answer import Generation

DEFAULT_FOLDER = Path("qwen2vl-tc-demo")
CHECKPOINT = "tiny-qwen2-vl"
ARTIFACT = f"{CHECKPOINT}.artifact"
PICTURE = "shapes.png"
PROMPT = "Describe the picture."
# of combinations that the model was never trained on
SCENE = Scene(
    (
        Thing("red", "circle", "top left"),
        Thing("blue", "square", "top right"),
        Thing("yellow", "triangle", "bottom right"),
    ),
    seed=0,
)
EXPECTED = description(SCENE)
MAX_LENGTH = 512
NEW_TOKENS = 64
# makes git ignore the folder, and tells a later demo that it may write there
_IGNORE = ".gitignore"
_MARK = "# made by qwen2vl-tc demo\n*\n"


@dataclass(frozen=True)
class DemoResult:
    """What a demo made and how long it took."""

    folder: Path
    built: BuildResult
    answer: "Generation"
    inspection: Inspection
    seconds: float


def summary(made: DemoResult, keep: bool) -> list[str]:
    """What happened, in lines, for somebody who sees all of this for the first time."""
    inspection, answer = made.inspection, made.answer
    text, vision = inspection.model.text, inspection.model.vision
    values = inspection.weights.values if inspection.weights else 0
    lines = [
        f"Made in {made.seconds:.0f} s: an artifact of a Qwen2-VL with {values / 1e6:.1f} million weights "
        f"({text.num_layers} text and {vision.depth} vision layers).",
        f'It has learned to describe coloured shapes and nothing else, and said rightly: "{answer.text}" The graphs '
        "are real GE graphs that torchair traced on an emulated NPU, and this machine's CPU executed them.",
    ]
    if made.built.report is not None:
        conclusion = made.built.report.conclusion
        lines.append(f"Measured on the same weights, Hugging Face transformers being the original: {conclusion}.")
    counts = []
    for name, graph in inspection.graphs.items():
        recipe = RECIPE_7B["decode" if name.startswith("decode") else name]
        counts.append(f"{name} {graph.ops.per_layer} (recipe at 7B: {recipe['per_layer']})")
    lines.append(f"Device operators per layer: {', '.join(counts)}; transposes of a weight: {_transposes(inspection)}.")
    timings = answer.timings_ms
    lines.append(
        f"{len(answer.prompt_token_ids)} prompt tokens and {len(answer.token_ids)} new ones; first token after "
        f"{timings['first_token']:.0f} ms, then {timings.get('per_token', 0.0):.1f} ms each, on the CPU."
    )
    if keep:
        lines.append(f"All of it is in {made.folder} (git ignores it; delete it when you like).")
    lines += [
        "Next, with a real checkpoint:",
        "  " + command("qwen2vl-tc", "build", "--src", "Qwen2-VL-2B-Instruct", "--out", "qwen2-vl-2b.artifact"),
        "  "
        + command("qwen2vl-tc", "generate", "qwen2-vl-2b.artifact", "--image", "cat.jpg", "--prompt", "What is this?"),
    ]
    return lines


def _transposes(inspection: Inspection) -> str:
    ours = sum(graph.ops.transpose_weight for graph in inspection.graphs.values())
    return f"{ours} (recipe at 7B: {sum(figures['transpose_weight'] for figures in RECIPE_7B.values())})"


def prepare(folder: Path) -> None:
    """Make the folder, or take an earlier demo's, and put the checkpoint and the picture into it.

    Raises ToolchainError for any other that is not empty."""
    mark = folder / _IGNORE
    # whoever made the folder could have put links into it
    if own_folder(folder) and any(folder.iterdir()) and not (mark.is_file() and mark.read_bytes() == _MARK.encode()):
        raise ToolchainError(f"{folder}: holds something else than a demo; choose another --out")
    folder.parent.mkdir(parents=True, exist_ok=True)
    make_own(folder)
    mark.write_text(_MARK)
    make_own(folder / CHECKPOINT)
    for file in TRAINED.iterdir():
        shutil.copyfile(file, folder / CHECKPOINT / file.name)
    draw(SCENE)[0].save(folder / PICTURE)


def remove(folder: Path) -> None:
    """Delete what a demo makes, and the folder unless a user put something into it."""
    for name in (CHECKPOINT, ARTIFACT):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (PICTURE, _IGNORE):
        (folder / name).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()
