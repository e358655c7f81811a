"""Any test may `import torch` or `import transformers`, whatever is installed and with no variable set by the user."""

from qwen2vl_tc.artifacts.process import prepare_process
from qwen2vl_tc.toolchain.transformers_import import import_transformers

prepare_process()
import_transformers()
