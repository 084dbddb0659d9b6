"""`python -m sae_runner`, which is how torchrun starts every rank."""

from sae_runner.cli import main

if __name__ == "__main__":
    main()
