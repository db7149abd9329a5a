"""Imports distil_fast from the folder given, in the place of the editable install, and calls it once."""

import os
import sys

os.chdir(sys.argv[1])
sys.path.insert(0, sys.argv[1])
# the editable install answers through a finder of its own, ahead of sys.path
sys.meta_path = [finder for finder in sys.meta_path if "Redirecting" not in type(finder).__name__]

import torch  # noqa: E402

import distil_fast  # noqa: E402

assert distil_fast.__file__ is not None
assert distil_fast.__file__.startswith(sys.argv[1]), distil_fast.__file__
loss = distil_fast.distillation_loss(torch.randn(8, 99, requires_grad=True), torch.randn(8, 99)).loss
loss.backward()
print(f"wheel: imported from {distil_fast.__file__}, loss {loss.item():.4f}")
