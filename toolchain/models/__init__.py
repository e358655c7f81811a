"""The one definition of the model: modules that call the NPU's fused operators, and what is traced of them."""
