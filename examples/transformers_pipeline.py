"""A transformers pipeline reads beyond its model's trained length, after `rw.patch` on the model.

python examples/transformers_pipeline.py
python examples/transformers_pipeline.py --rope "rerope:0.25x|logn" --tokens 9000
"""

import argparse

from transformers import pipeline

import ropewalk as rw
from ropewalk.evals import load_text

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--model", default="smollm2-135m")
parser.add_argument("--rope", default="yarn:2")
parser.add_argument("--tokens", type=int, default=8400, help="length of the prompt")
args = parser.parse_args()

loaded = rw.load(args.model, compile=False)
model, tokenizer = loaded.hf, loaded.tokenizer  # or AutoModelForCausalLM.from_pretrained(...), AutoTokenizer...
writer = pipeline("text-generation", model=model, tokenizer=tokenizer)

text = rw.windows(load_text("shakespeare").documents[0], tokenizer, tokens=args.tokens)[0]
options = {"max_new_tokens": 40, "do_sample": False, "return_full_text": False}
handle = rw.patch(model, args.rope)
print(handle.describe(), end="\n\n")
print(f"after {args.tokens} tokens: {writer(text, **options)[0]['generated_text']!r}")
handle.undo()  # bit for bit the model that it was
print(f"untouched: {writer('It was', **options)[0]['generated_text']!r}")
