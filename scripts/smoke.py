"""Every shipped SAE and every kind of model on tiny configs, through the command line.

    python scripts/smoke.py [outputs]

Prints one line a composition and exits with 1 if any failed. A kind whose package or weights are
not here runs with random weights; nothing is fetched.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sae_runner.config import options_of

TINY = ["trainer.n_tokens=4096", "trainer.batch_size=256", "trainer.log_every=4",
        "eval.n_rows=512", "evaluators.sparsity.n_bootstrap=50",
        "evaluators.reconstruction.n_bootstrap=50"]  # fmt: skip
DIGITS = ["dataset=digits", "dataset.n_examples=32", "dataset.n_heldout=8", "sae.expansion=2",
          "sae.k=8", "model.batch_size=4"]  # fmt: skip
PAIR = ["site.name=blocks.2.resid_mid", "site.target=blocks.2.mlp_out"]
KINDS = [sae for sae in options_of("sae") if sae != "transcoder"]
COMPOSITIONS: dict[str, list[str]] = {
    **{f"sae={sae}": ["model=toy", f"sae={sae}"] for sae in KINDS},
    "sae=transcoder": ["model=tiny_clip", "model.epochs=1", "sae=transcoder", *PAIR, *DIGITS],
    "trainer/objective=e2e": ["model=tiny_lm", "model.n_steps=5", "dataset.n_examples=40",
                              "trainer/objective=e2e", "trainer.batch_size=512"],
    "model=toy store=stream": ["model=toy", "store=stream", "dataset.n_examples=4096"],
    "model=tiny_clip": ["model=tiny_clip", "model.epochs=1", *DIGITS],
    "model=tiny_lm": ["model=tiny_lm", "model.n_steps=5", "dataset.n_examples=40"],
    "model=minilm": ["model=minilm", "dataset=stdlib_text", "dataset.n_examples=20"],
    "model=clip_vit_b32": ["model=clip_vit_b32", "model.weights=random", "site.tokens=cls",
                           *DIGITS],
    "model=siglip_b16": ["model=siglip_b16", "model.weights=random", *DIGITS],
    "model=vit_b16": ["model=vit_b16", "model.weights=random", *DIGITS],
    "model=mnist_mlp": ["model=mnist_mlp", *DIGITS],
}  # fmt: skip


def main() -> None:
    """Run them all."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder)
        failed = 0
        for name, words in COMPOSITIONS.items():
            start = time.perf_counter()
            command = [sys.executable, "-m", "sae_runner", "train", f"outputs={outputs}"]
            done = subprocess.run([*command, *TINY, *words], capture_output=True, text=True)
            failed += done.returncode != 0
            verdict = "ok" if done.returncode == 0 else f"FAILED ({done.returncode})"
            print(f"{verdict:12}{time.perf_counter() - start:6.1f}s  {name}", flush=True)
            if done.returncode:
                print(done.stderr[-2000:])
        sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
