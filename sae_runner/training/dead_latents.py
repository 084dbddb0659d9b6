"""Which latents have stopped firing, counted in rows (tokens), not steps."""

import torch
from jaxtyping import Bool, Int64
from torch import Tensor


class DeadLatents:
    """Rows seen since each latent last fired; dead at `window` rows (Gao et al. 2024)."""

    def __init__(self, d_sae: int, window: int, device: torch.device) -> None:
        self.window = window
        self.rows_since_fired = torch.zeros(d_sae, dtype=torch.int64, device=device)

    def update(self, fired: Int64[Tensor, " d_sae"], n_rows: int) -> None:
        """Count a batch in which latent i was active in `fired[i]` of `n_rows` rows."""
        self.rows_since_fired += n_rows
        self.rows_since_fired[fired > 0] = 0

    @property
    def dead(self) -> Bool[Tensor, " d_sae"]:
        """True for latents that are silent for at least `window` rows."""
        return self.rows_since_fired >= self.window
