"""The modules that the graphs are traced from, run operator by operator."""
