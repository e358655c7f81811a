"""`python -m qwen2vl_tc`, where the console script is not on the path."""

from .toolchain.cli.main import main

main()
