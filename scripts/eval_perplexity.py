#!/usr/bin/env python
"""Perplexity of a checkpoint, and its divergence from the original: `lowbit eval` under its usual name.

python scripts/eval_perplexity.py out/model-w4 --reference org/model --dataset test.txt
"""

import sys

from lowbit.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["eval"]
    main()
