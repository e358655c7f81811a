"""The command line: parses, calls the functions that do the work, and prints what they return.

Every command imports what it needs when it runs: `--help` stays fast, and nothing imports torch before main() has
prepared the process.
"""

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from ...artifacts.errors import TargetError
from ...artifacts.host.process import current_folder, prepare_process
from . import bench, build, check, demo, generate, inspect, selftest
from .console import fail
from .errors import REFUSED, Commands
from .groups import grouped
from .options import examples
from .streams import prepare_streams

DEBUG_VARIABLE = "QWEN2VL_TC_DEBUG"

app = typer.Typer(
    cls=Commands,
    name="qwen2vl-tc",
    help="Compile Qwen2-VL and Qwen2.5-VL for Ascend NPUs, ahead of time: from a Hugging Face checkpoint to one "
    "artifact that loads and generates without tracing anything.",
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


for _name, _command, _examples in (
    ("convert", build.convert, build.CONVERT_EXAMPLES),
    ("compile", build.compile, build.COMPILE_EXAMPLES),
    ("build", build.build, build.BUILD_EXAMPLES),
    ("verify", build.verify, build.VERIFY_EXAMPLES),
    ("inspect", inspect.inspect, inspect.INSPECT_EXAMPLES),
    ("check", check.check, check.EXAMPLES),
    ("generate", generate.generate, generate.GENERATE_EXAMPLES),
    ("chat", generate.chat, generate.CHAT_EXAMPLES),
    ("bench", bench.bench, bench.BENCH_EXAMPLES),
    ("bench cold-start", bench.cold_start, bench.COLD_START_EXAMPLES),
    ("warm", selftest.warm, selftest.WARM_EXAMPLES),
    ("selftest", selftest.selftest, selftest.SELFTEST_EXAMPLES),
    ("sign", build.sign, build.SIGN_EXAMPLES),
    ("doctor", inspect.doctor, inspect.DOCTOR_EXAMPLES),
    ("demo", demo.demo, demo.EXAMPLES),
):
    app.command(_name, epilog=examples(*_examples))(grouped(_command))
