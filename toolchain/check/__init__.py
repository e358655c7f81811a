"""Would a CANN release take the graphs? Rules with their sources, held against every node. Imports no engine."""
