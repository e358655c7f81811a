"""The one definition of each model: modules that call the NPU's fused operators, and what is traced of them.

A family's module has `tables`, the constants of its graphs, and `MODULES`, a class with a method for every GraphSpec.
"""
