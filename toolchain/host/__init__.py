"""The machine: what it can build and run, and preparing it."""
