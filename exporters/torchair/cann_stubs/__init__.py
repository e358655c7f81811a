"""Stand-ins for CANN's libraries: the real torch-npu and torchair import and trace without CANN and without NPU."""
