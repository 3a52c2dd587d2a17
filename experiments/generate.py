"""Write text with a trained model: python -m experiments.generate experiments/runs/gsa --prompt "def "."""

import argparse
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError

from experiments import checkpoint
from gsa_ref import LanguageModel, generate
from gsa_ref.generation import decode


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status. Bad usage ends with status 2 and says what was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--prompt", default="def ", help="text to continue (default: 'def ')")
    parser.add_argument("--tokens", type=int, default=200, help="bytes to add (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest byte (default 0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, help="probability of the nucleus (default 0.95)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    options = parser.parse_args(argv)
    try:
        settings, _ = checkpoint.read_run(options.run)
        model = LanguageModel(settings.model_config()).eval()
        if checkpoint.load_weights(options.run, model):
            raise ValueError(f"run: expected a checkpoint of {settings.variant}, got one of another variant")
        new = generate(
            model,
            options.prompt,
            max_new_tokens=options.tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            generator=torch.Generator().manual_seed(options.seed),
            progress=True,
        )
    except (TypeError, ValueError, OSError, SafetensorError) as error:
        parser.error(str(error))
    print(options.prompt + decode(new[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
