"""One module per target: torchair (GE graphs, .air)."""
