"""`python -m qwen2vl_tc.toolchain`, where the console script is not on the path."""

from .cli.main import main

main()
