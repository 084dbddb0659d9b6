"""What `scripts/benchmark.py` measures, one subcommand a file.

A subcommand has `add_arguments(parser)` and `run(options, folder) -> Result`, where `folder` is an
empty one that is removed afterwards.
"""
