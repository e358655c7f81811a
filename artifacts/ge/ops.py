"""The operators that every GE graph is made with, whatever it computes, and the sizes that ours are made for."""

# Patches of one run of the visual graph, padding included: what CANN's host code was run to, and the processor's own
# largest picture.
MOST_PATCHES = 1 << 16
# Sequences of one run in the TND layout, as documented.
MOST_PACKED = 4096
INPUTS = ("Data", "RefData")
OUTPUT = "NetOutput"
CONSTANT = "Const"
FILE_CONSTANT = "FileConstant"
# the output that a control edge names
CONTROL = "-1"
