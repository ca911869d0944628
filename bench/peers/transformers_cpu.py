"""Hugging Face transformers on this CPU, measured in its own environment; prints one JSON object as its last line.

Stands alone (standard library, torch and transformers): `bench.compare` runs it with the interpreter of another virtual
environment. Greedy `generate` with a static number of new tokens, prompts of random ids; a run is one batched call. The
decode rate leaves out the time of the same call with one new token.

Example: PEER_PYTHON bench/peers/transformers_cpu.py --model=DIR --prompt_tokens=128 --output_tokens=128 --batch_size=16 --repetitions=3
"""

import argparse
import json
import sys
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a local Hugging Face directory")
    parser.add_argument("--weights", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--prompt_tokens", type=int, default=128)
    parser.add_argument("--output_tokens", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=1, help="sequences in one generate call")
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    args = parser.parse_args()

    import torch  # pyright: ignore[reportMissingImports] - lives in the peer's environment
    import transformers  # pyright: ignore[reportMissingImports]

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.weights), local_files_only=True)
    model.eval()

    def generate_s(batch: int, new_tokens: int) -> float:
        low = min(256, model.config.vocab_size // 2)
        ids = torch.randint(low, model.config.vocab_size, (batch, args.prompt_tokens))  # [S, C]
        begun_s = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        elapsed_s = time.perf_counter() - begun_s
        if out.shape != (batch, args.prompt_tokens + new_tokens):
            sys.exit(f"generate gave {tuple(out.shape)}")
        return elapsed_s

    results = []
    for batch in (args.batch_size,):
        generate_s(batch, 2)
        for _ in range(args.repetitions):
            prefill_s = generate_s(batch, 1)
            total_s = generate_s(batch, args.output_tokens)
            results.append(
                {
                    "batch": batch,
                    "prefill_s": prefill_s,
                    "total_s": total_s,
                    "output_tokens_per_s": batch * args.output_tokens / total_s,
                    "decode_tokens_per_s": batch * (args.output_tokens - 1) / (total_s - prefill_s),
                    "prefill_tokens_per_s": batch * args.prompt_tokens / prefill_s,
                }
            )
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]}
    print(json.dumps({"peer": "transformers", "versions": versions, "threads": torch.get_num_threads(), "results": results}))


if __name__ == "__main__":
    main()
