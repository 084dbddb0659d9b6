"""One file per sub-command, each with `main(cfg)`."""
