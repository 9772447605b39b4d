"""Continue prompts with llama.cpp, greedily. ``benchmarks.gguf_files`` runs this with the Python of
an environment of its own.

``python benchmarks/llama_continue.py FILE COUNT PROMPT...`` prints JSON: for each prompt its tokens
and the COUNT tokens that follow, each the most likely one. Needs nothing of this project.
"""

import json
import sys

import numpy as np
from llama_cpp import Llama


def main() -> None:
    path, count, *prompts = sys.argv[1:]
    model = Llama(path, n_ctx=1024, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    found = []
    for prompt in prompts:
        tokens = model.tokenize(prompt.encode(), add_bos=True, special=False)
        model.reset()
        new, given = [], tokens
        for _ in range(int(count)):
            model.eval(given)
            given = [int(np.argmax(model.scores[model.n_tokens - 1]))]
            new += given
        found.append({"tokens": tokens, "new": new})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
