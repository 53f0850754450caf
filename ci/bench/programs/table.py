"""A dict of lists, updated without end as accounts are: a few of them often, most of them hardly ever.

table.py [KEYS]: some 260 MB of small objects and pointers at the default of 700,000 keys.
"""

from __future__ import annotations

import random
import sys
from typing import Any

keys = int(sys.argv[1]) if len(sys.argv) > 1 else 700_000
draw = random.Random(1)  # noqa: S311 - no secret
table: dict[str, Any] = {
    f"account-{number}": [number, float(number), [], f"holder {number * 7919 % keys}"]
    for number in range(keys)
}
step = 0
while True:
    for _ in range(20_000):
        number = int(draw.paretovariate(1.0) * 50) % keys
        account = table[f"account-{number}"]
        account[1] += draw.gauss(0, 10)
        account[2].append(step)
        if len(account[2]) > 8:
            account[2] = account[2][4:]
    step += 1
    print(f"step {step} total {sum(table[f'account-{n}'][1] for n in range(0, keys, 1000)):.2f}", flush=True)
