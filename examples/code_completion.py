"""Code completion at any cursor: the text before it may end inside a word, an indent or a character.

    python examples/code_completion.py

A cursor often stands inside what the model would write as one token. No model was trained to begin a new token there.
ropewalk draws the first token among all *covers* of the text (docs/continuation.md), each with its probability.
"""

import argparse

import ropewalk as rw

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--model", default="smollm2-135m")
args = parser.parse_args()

FILE = '''import numpy as np
import matplotlib.pyplot as plt

def moving_average(values, window):
    """The mean of every `window` values."""
    return np.convolve(values, np.ones(window), mode="valid") / window

def plot(values):
    plt.plot(moving_average(values, 10))
    plt.show()

'''
CURSORS = ["def mov", "average = moving_av", "    retur", "for value in range(", "if __name__ == '__ma", "plt.sho"]

model = rw.load(args.model)
editor = model.session()  # the file is read once for all cursors
editor.append(FILE)
for cursor in CURSORS:
    row = [cursor]
    for continuation in ("off", "exact"):
        params = rw.SamplingParams(max_new_tokens=8, temperature=0, stop="\n", continuation=continuation)
        row.append(editor.generate(cursor, params).text)
        editor.crop(len(FILE))
    print("{:<24} new token: {!r:<28} exact: {!r}".format(*row))
print("\nnext byte after 'import nump':", end=" ")
probabilities = model.next_byte_logprobs("import nump").exp()
likeliest = probabilities.argsort(descending=True)[:3].tolist()
print(", ".join(f"{chr(byte)!r} {probabilities[byte]:.1%}" for byte in likeliest))
