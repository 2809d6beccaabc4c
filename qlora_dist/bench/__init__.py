"""`qlora-dist bench`: throughput of whole runs, kernels against their ceilings, peers side by side.

Whatever trains runs in processes of its own; the command's own process holds no GPU memory while they do.
"""
