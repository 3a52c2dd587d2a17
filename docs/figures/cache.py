"""Quoted figures of docs/reference/cache.md: what a token takes at the default sizes of GSAConfig. No pictures."""

import torch
from style import main

from gsa_ref import GSACache, GSAConfig

CONFIG, L = GSAConfig(), 2**17
TOKEN = GSACache.bytes_per_token(CONFIG, dtype=torch.bfloat16)
TOKEN_DENSE = GSACache.bytes_per_token(CONFIG.variant("dense"), dtype=torch.bfloat16)

if __name__ == "__main__":
    main(
        "cache",
        {},
        {
            "token": f"{TOKEN:,}",
            "token_dense": f"{TOKEN_DENSE:,}",
            "L": f"{L:,}",
            "sequence": f"{TOKEN * L / 2**20:.0f} MiB",
            "sequence_dense": f"{TOKEN_DENSE * L / 2**20:.0f} MiB",
        },
    )
