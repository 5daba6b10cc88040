"""Training speed of PyTorch eager on a model of models/, beside `fathom train` on the same file.

    pip install torch transformers        # CPU wheels
    cargo build --release
    python benches/pytorch.py --fathom target/release/fathom

Both train in fp32 on the same number of threads with the same batch: forward, backward, clipping,
AdamW. They take turns, a round each, so that a busy machine slows both; the medians of the rounds
are compared. PyTorch runs the Hugging Face model with eager attention and eager experts. Fathom's
fp8 and bf16 modes follow in the same rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path


HERE = Path(__file__).resolve().parent


def pytorch_trainer(config_file, args):
    """A function that runs steps and returns tokens a second, and the parameters' number."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = DeepseekV3Config(**json.loads(Path(config_file).read_text()))
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = DeepseekV3ForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)

    def run():
        start = time.perf_counter()
        for _ in range(args.steps):
            ids = torch.randint(config.vocab_size, (args.batch, args.length))
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return args.steps * args.batch * args.length / (time.perf_counter() - start)

    run()
    parameters = sum(p.numel() for p in model.parameters())
    return run, parameters


def fathom(args, model, precision):
    """Tokens a second of `fathom train` over the steps alone, as it reports them."""
    with tempfile.TemporaryDirectory() as out:
        command = [
            args.fathom, "train", "--json", "--config", str(HERE / "models/pytorch.toml"),
            "--set", f'model={{path="{model}"}}', "--set", f"seq_len={args.length}",
            "--set", f"micro_batch={args.batch}", "--set", f"schedule.batch={args.batch}",
            "--steps", str(args.steps), "--precision", precision, "--out", out,
        ]
        environment = {**os.environ, "RAYON_NUM_THREADS": str(args.threads)}
        answer = subprocess.run(command, check=True, capture_output=True, env=environment)
        return json.loads(answer.stdout)["tokens_per_second"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", default=["v3-1m", "v3-8m"])
    parser.add_argument("--fathom", default="target/release/fathom")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    for name in args.models:
        model = HERE / "models" / name
        run, parameters = pytorch_trainer(model / "config.json", args)
        tokens = {"pytorch fp32": []} | {f"fathom {p}": [] for p in ("fp32", "bf16", "fp8")}
        for _ in range(args.rounds):
            for who, found in tokens.items():
                who, precision = who.split()
                found.append(run() if who == "pytorch" else fathom(args, model, precision))
        base = statistics.median(tokens["pytorch fp32"])
        print(f"{name}: {parameters} parameters, {args.batch} x {args.length} tokens, "
              f"{args.threads} threads, median of {args.rounds}")
        for who, found in tokens.items():
            middle = statistics.median(found)
            print(f"  {who:13} {middle:8.0f} tokens/s {middle / base:6.2f} of pytorch "
                  f"({min(found):.0f} to {max(found):.0f})")


if __name__ == "__main__":
    main()
