"""Training speed of PyTorch eager on a model of models/, beside `fathom train` on the same file.

    pip install torch transformers        # CPU wheels
    cargo build --release
    python benches/pytorch.py --fathom target/release/fathom models/v3-1m.json models/v3-8m.json

Both train in fp32 on the same number of threads with the same batch: forward, backward, clipping,
AdamW. They take turns, a round each, so that a busy machine slows both; the medians of the rounds
are compared. PyTorch runs the Hugging Face model with eager attention and eager experts.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path


def pytorch_trainer(config_file, batch, length, threads):
    """A function that runs steps and returns tokens a second."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = DeepseekV3Config(**json.loads(Path(config_file).read_text()))
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = DeepseekV3ForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)

    def run(steps):
        start = time.perf_counter()
        for _ in range(steps):
            ids = torch.randint(config.vocab_size, (batch, length))
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return steps * batch * length / (time.perf_counter() - start)

    run(2)
    parameters = sum(p.numel() for p in model.parameters())
    return run, parameters


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("configs", nargs="+")
    parser.add_argument("--fathom", default="target/release/fathom")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    for config in args.configs:
        run, parameters = pytorch_trainer(config, args.batch, args.length, args.threads)
        theirs = [run(args.steps) for _ in range(args.rounds)]
        print(config, parameters, statistics.median(theirs), max(theirs))


if __name__ == "__main__":
    main()
