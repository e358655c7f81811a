"""The command line: parses, calls the functions that do the work, and prints what they return.

Every command imports what it needs when it runs: `--help` stays fast, and nothing imports torch before main() has
prepared the process.
"""

import dataclasses
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from ...artifacts.errors import ConfigError, TargetError
from ...artifacts.host.process import current_folder, prepare_process
from ...artifacts.soc import DEFAULT_SOC
from ..build.onnx import DEFAULT_WEIGHTS
from . import bench as cli_bench
from . import check as cli_check
from . import generate as cli_generate
from . import selftest as cli_selftest
from .console import fail
from .errors import FAILED, REFUSED, Commands
from .options import (
    Artifact,
    Batch,
    Dtype,
    Dump,
    Json,
    MaxLength,
    Mode,
    MustAdmit,
    NoSync,
    Operators,
    OptionalArtifact,
    Passes,
    Soc,
    Src,
    StandardOnly,
    TrustedKeys,
    VisualAttention,
    Weights,
    examples,
)
from .streams import prepare_streams
from .values import batches, check_mode, check_source, config_file, dump, passes, releases

DEBUG_VARIABLE = "QWEN2VL_TC_DEBUG"

app = typer.Typer(
    cls=Commands,
    name="qwen2vl-tc",
    help="Compile Qwen2-VL for Ascend NPUs, ahead of time: from a Hugging Face checkpoint to one artifact that loads "
    "and generates without tracing anything.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The console script."""
    try:
        prepare_streams()
        current_folder()
    except TargetError as error:
        fail(str(error))
        sys.exit(REFUSED)
    prepare_process()
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qwen2vl-tc {version('qwen2vl-tc')}")
        raise typer.Exit


@app.callback(
    epilog=examples(
        "qwen2vl-tc demo",
        "qwen2vl-tc build --src Qwen2-VL-7B-Instruct --out qwen2-vl-7b.artifact",
        "qwen2vl-tc generate qwen2-vl-7b.artifact --image cat.jpg --prompt 'What is this?'",
    )
)
def _root(
    debug: Annotated[
        bool, typer.Option("--debug", envvar=DEBUG_VARIABLE, help="Show the traceback of an error.")
    ] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(
    epilog=examples(
        "qwen2vl-tc convert --src Qwen2-VL-7B-Instruct",
        "qwen2vl-tc convert --src Qwen2-VL-7B-Instruct --out qwen2-vl-7b.artifact --dtype bf16",
    )
)
def convert(
    src: Src,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="ARTIFACT", help="Default: ./<name of DIR>.artifact. Its graphs are kept."),
    ] = None,
    dtype: Dtype = None,
    no_sync: NoSync = False,
) -> None:
    """Write a checkpoint's weights and tokenizer into an artifact, restructured for the graphs.

    Streams: memory stays small whatever the model's size. A run that was stopped resumes.
    """
    from ...artifacts.store import read_manifest
    from ..weights.convert import convert as convert_weights
    from .console import bytes_progress
    from .locate import default_artifact
    from .output import print_converted, warn_signed

    check_source(src)
    target = out or default_artifact(src)
    warn_signed(target)
    with bytes_progress("convert") as progress:
        converted = convert_weights(src, target, dtype, progress=progress, sync=not no_sync)
    print_converted(converted, target, has_graphs=read_manifest(target).ge is not None)


@app.command(
    epilog=examples(
        "qwen2vl-tc compile",
        "qwen2vl-tc compile qwen2-vl-7b.artifact --mode dynamo --soc Ascend910B2 --max-length 8192 --batch 1,4",
        "qwen2vl-tc compile --config Qwen2-VL-72B-Instruct/config.json --out qwen2-vl-72b.artifact",
        "qwen2vl-tc compile qwen2-vl-7b.artifact --cann 9.0,9.1",
        "qwen2vl-tc compile qwen2-vl-7b.artifact --mode air",
        "qwen2vl-tc compile qwen2-vl-7b.artifact --mode onnx --weights int4",
    )
)
def compile(
    artifact: OptionalArtifact = None,
    mode: Mode = "dynamo",
    soc: Soc = DEFAULT_SOC,
    max_length: MaxLength = None,
    batch: Batch = "1",
    dtype: Dtype = None,
    operators: Operators = "fused",
    visual_attention: VisualAttention = "segments",
    dump_format: Dump = None,
    pass_names: Passes = None,
    cann: MustAdmit = None,
    weights: Weights = DEFAULT_WEIGHTS,
    standard_only: StandardOnly = False,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="Compile from a config.json alone, without any weights."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="ARTIFACT", help="With --config: the artifact to make.")
    ] = None,
) -> None:
    """Trace the graphs for a target and put them into an artifact; its weights stay as they are.

    Needs neither an NPU nor CANN.
    """
    from ..build.air import export_air
    from ..build.compile import CompileOptions, compile_artifact, compile_config
    from ..build.onnx import OnnxOptions, export_onnx
    from .console import step_progress
    from .locate import find_artifact
    from .output import print_admitted, print_compiled, print_exported, print_onnx, print_written, warn_signed

    check_mode(mode)
    options = CompileOptions(
        soc=soc,
        max_length=max_length,
        batches=batches(batch),
        dtype=dtype,
        dump_pbtxt=dump(dump_format),
        operators=operators,
        visual_attention=visual_attention,
        passes=passes(pass_names),
        cann=releases(cann) if cann else (),
    )
    if (config is None) != (out is None) or (config is not None and artifact is not None):
        raise ConfigError("give either an artifact, or --config and --out together")
    target = out or artifact or find_artifact(Path())
    warn_signed(target)
    onnx_options = OnnxOptions(weights, standard_only, max_length)
    if mode == "onnx":
        if options != CompileOptions(max_length=max_length) or config is not None:
            raise TargetError(
                "--mode onnx takes an artifact, --weights, --standard-only and --max-length, nothing else"
            )
        with step_progress("compile") as progress:
            manifest = export_onnx(target, onnx_options, progress)
        print_onnx(manifest)
        print_written(manifest, target)
        return
    if onnx_options != OnnxOptions(max_length=max_length):
        raise TargetError("--weights and --standard-only are for --mode onnx")
    if mode == "air":
        if options != CompileOptions() or config is not None:
            raise TargetError("--mode air exports the graphs that are there: it takes no option but the artifact")
        with step_progress("compile") as progress:
            manifest = export_air(target, progress)
        print_exported(manifest, target)
        return
    with step_progress("compile") as progress:
        if config is None:
            manifest = compile_artifact(target, options, progress)
        else:
            manifest = compile_config(config_file(config), target, options, progress)
    print_compiled(manifest)
    print_admitted(manifest)
    print_written(manifest, target)


@app.command(
    epilog=examples(
        "qwen2vl-tc build --src Qwen2-VL-7B-Instruct --out qwen2-vl-7b.artifact",
        "qwen2vl-tc build --src Qwen2-VL-2B-Instruct --out qwen2-vl-2b.artifact --dtype fp16 --batch 1,4 --no-verify",
    )
)
def build(
    src: Src,
    out: Annotated[Path, typer.Option("--out", metavar="ARTIFACT", help="Replaced as a whole, at the very end.")],
    mode: Mode = "dynamo",
    soc: Soc = DEFAULT_SOC,
    max_length: MaxLength = None,
    batch: Batch = "1",
    dtype: Dtype = None,
    operators: Operators = "fused",
    visual_attention: VisualAttention = "segments",
    dump_format: Dump = None,
    pass_names: Passes = None,
    cann: MustAdmit = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not compare with transformers; the manifest records that.")
    ] = False,
    no_sync: NoSync = False,
) -> None:
    """Convert, compile and verify: the one offline command.

    An artifact that fails verification is not written, and the exit code is 1. A run that was stopped resumes.
    """
    from ..build.build import Phases
    from ..build.build import build as build_artifact
    from ..build.compile import CompileOptions
    from .console import bytes_progress, stdout, step_progress
    from .output import print_admitted, print_compiled, print_written, warn_notes, warn_signed

    check_mode(mode)
    if mode == "air":
        raise TargetError("--mode air: build the graphs first, then run `qwen2vl-tc compile ARTIFACT --mode air`")
    if mode == "onnx":
        raise TargetError("--mode onnx: build, or convert, first, then run `qwen2vl-tc compile ARTIFACT --mode onnx`")
    check_source(src)
    options = CompileOptions(
        soc=soc,
        max_length=max_length,
        batches=batches(batch),
        dtype=dtype,
        dump_pbtxt=dump(dump_format),
        operators=operators,
        visual_attention=visual_attention,
        passes=passes(pass_names),
        cann=releases(cann) if cann else (),
    )
    warn_signed(out)
    phases = Phases(bytes_progress, step_progress)
    built = build_artifact(
        src, out, dtype=dtype, options=options, verify=not no_verify, sync=not no_sync, phases=phases
    )
    warn_notes(built.converted)
    print_compiled(built.manifest)
    if built.report is not None:
        from ..verify.render import render

        render(built.report, stdout())
    if not built.committed:
        fail(f"verification failed: {out} was not written")
        raise typer.Exit(FAILED)
    print_admitted(built.manifest)
    print_written(built.manifest, out)


@app.command(epilog=examples("qwen2vl-tc verify qwen2-vl-7b.artifact --against Qwen2-VL-7B-Instruct"))
def verify(
    artifact: Artifact,
    against: Annotated[
        Path, typer.Option("--against", metavar="DIR", help="The checkpoint that the artifact was made from.")
    ],
    trusted_key: TrustedKeys = None,
    as_json: Json = False,
) -> None:
    """Compare an artifact with the original model, run by transformers in fp32, and record the result in it.

    The exit code is 1 if it differs by more than the stated tolerance.
    """
    from ...artifacts.store import read_manifest
    from ..verify.render import render
    from ..verify.subjects import parts_of
    from ..verify.verify import verify_artifact
    from .console import result_json, stdout, step_progress
    from .output import warn_signed

    check_source(against)
    warn_signed(artifact)
    reports = []
    for part in parts_of(read_manifest(artifact)):
        with step_progress("verify" if part == "ge" else "verify ONNX") as progress:
            reports.append(
                verify_artifact(artifact, against, part, progress=progress, trusted_keys=trusted_key or None)
            )
    if as_json:
        # the first is that of the GE graphs, where there are any
        first, *second = (dataclasses.asdict(report) for report in reports)
        result_json({**first, "onnx": second[0]} if second else first)
    else:
        for report in reports:
            render(report, stdout())
    if not all(report.passed for report in reports):
        fail(f"{artifact} differs from {against} by more than the tolerance")
        raise typer.Exit(FAILED)


@app.command(
    epilog=examples(
        "qwen2vl-tc inspect",
        "qwen2vl-tc inspect qwen2-vl-7b.artifact --json --patches 65536 --tokens 8192",
        "qwen2vl-tc inspect qwen2-vl-7b.artifact --graph decode_b1 --dot layer.dot",
    )
)
def inspect(
    artifact: OptionalArtifact = None,
    as_json: Json = False,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", metavar="N", help="Costs: tokens of the prompt, and of the cache. Default: 507."),
    ] = None,
    patches: Annotated[
        int | None, typer.Option("--patches", metavar="N", help="Costs: patches of the picture. Default: 1872.")
    ] = None,
    graph: Annotated[
        str | None, typer.Option("--graph", metavar="NAME", help="With --dot: the graph to draw a layer of.")
    ] = None,
    dot: Annotated[
        Path | None, typer.Option("--dot", metavar="FILE", help="Draw one layer for Graphviz, and print no report.")
    ] = None,
    trusted_key: TrustedKeys = None,
    layer: Annotated[
        int | None, typer.Option("--layer", metavar="N", help="With --dot: the layer, from 0. Default: the second.")
    ] = None,
) -> None:
    """Show what is in an artifact: graphs, operators, costs at given lengths, bytes, versions, target.

    With --trusted-key, the exit code is 1 after the report unless one of the keys signed the artifact.
    """
    from ...artifacts.naming import naming
    from ..inspect.inspect import draw_artifact, inspect_artifact, render
    from .console import result, result_json, stdout
    from .locate import find_artifact

    no_drawing = as_json or bool(trusted_key)
    if (graph is None) != (dot is None) or (layer is not None and dot is None) or (dot is not None and no_drawing):
        raise TargetError("a drawing takes --graph and --dot together, perhaps --layer, no --json and no --trusted-key")
    target = artifact or find_artifact(Path())
    if graph is not None and dot is not None:
        drawing = draw_artifact(target, graph, layer, tokens, patches)
        with naming(dot):
            dot.write_text(drawing.text)
        result(f"wrote {dot}: layer {drawing.layer} of {graph}, {drawing.device_ops} device operators")
        return
    inspection = inspect_artifact(target, tokens, patches, trusted_key or None)
    if as_json:
        result_json(dataclasses.asdict(inspection))
    else:
        render(inspection, stdout())
    if trusted_key and not (inspection.signed and inspection.signed.trusted):
        fail(f"{target}: not signed by a trusted key, see the signature in the report")
        raise typer.Exit(FAILED)


app.command(epilog=cli_check.EXAMPLES)(cli_check.check)
app.command(epilog=cli_generate.GENERATE_EXAMPLES)(cli_generate.generate)
app.command(epilog=cli_generate.CHAT_EXAMPLES)(cli_generate.chat)
app.command(epilog=cli_bench.BENCH_EXAMPLES)(cli_bench.bench)
app.command("bench cold-start", epilog=cli_bench.COLD_START_EXAMPLES)(cli_bench.cold_start)
app.command(epilog=cli_selftest.WARM_EXAMPLES)(cli_selftest.warm)
app.command(epilog=cli_selftest.SELFTEST_EXAMPLES)(cli_selftest.selftest)


@app.command(epilog=examples("qwen2vl-tc sign qwen2-vl-7b.artifact --key key.pem"))
def sign(
    artifact: Artifact,
    key: Annotated[
        Path,
        typer.Option(
            "--key", metavar="PEM", help="An ed25519 private key: openssl genpkey -algorithm ed25519 -out key.pem"
        ),
    ],
) -> None:
    """Sign an artifact, so that `generate --trusted-key` and load(trusted_keys=...) can tell whose it is.

    The public half: openssl pkey -in key.pem -pubout -out key.pub. What changes the artifact drops its signature.
    """
    from ..build.sign import sign_artifact
    from .console import result

    sign_artifact(artifact, key)
    result(f"signed {artifact}")


@app.command(epilog=examples("qwen2vl-tc doctor", "qwen2vl-tc doctor qwen2-vl-7b.artifact", "qwen2vl-tc doctor --json"))
def doctor(
    artifact: Annotated[
        Path | None, typer.Argument(metavar="[ARTIFACT]", help="Also ask CANN for the operators that it uses.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what this machine can build and run, and what to install for the rest."""
    from ..host.doctor import diagnose, render
    from .console import result_json, stdout

    diagnosis = diagnose(artifact)
    if as_json:
        result_json(dataclasses.asdict(diagnosis))
    else:
        render(diagnosis, stdout())


@app.command(epilog=examples("qwen2vl-tc demo", "qwen2vl-tc demo --out /tmp/demo", "qwen2vl-tc demo --no-keep"))
def demo(
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Default: ./qwen2vl-tc-demo, which git ignores.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep/--no-keep", help="Keep what was made, or delete it at the end.")] = True,
) -> None:
    """No weights at hand: take a tiny trained model, build it, ask it about a picture and inspect it."""
    from ..demo.demo import DEFAULT_FOLDER, run_demo

    run_demo(out or DEFAULT_FOLDER, keep=keep)
