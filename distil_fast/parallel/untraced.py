"""The losses as torch.compile is to see them: calls that it breaks its graph at, and does not look into.

Imported only where something is being traced: what marks a function so imports the compiler, which takes a second.
Next: __init__.py.
"""

from __future__ import annotations

import torch

from distil_fast.parallel import call, linear

_WHY = "distil_fast: ranks of a sharded vocabulary look at each other's arguments, which cannot be traced"

logits_loss = torch.compiler.disable(call.loss, reason=_WHY)
linear_loss = torch.compiler.disable(linear.loss, reason=_WHY)
