"""Uses the installed distil_fast as a stranger would; run it with `python -I`, away from the source tree.

Without torch beside it only the native module is loaded, which needs none; with torch one call of each kind is held
against the plain torch of `distil_fast.reference`. Next: check_wheel.py, which makes the environments.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from importlib import resources
from pathlib import Path


def native_module() -> str:
    """The extension alone, as the package's __init__ would import torch. Returns the instruction set it chose."""
    package = importlib.util.find_spec("distil_fast")
    assert package is not None
    assert package.submodule_search_locations
    (path,) = Path(package.submodule_search_locations[0]).glob("_C.*.so")
    loader = importlib.machinery.ExtensionFileLoader("distil_fast._C", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("distil_fast._C", loader))
    loader.exec_module(module)
    assert "forward_kl" in module.DIVERGENCES
    return str(module.instruction_set())


def losses() -> float:
    """Loss and gradient of rows and of heads, as the reference has them."""
    import torch

    import distil_fast

    torch.manual_seed(0)
    student, teacher = torch.randn(8, 999), torch.randn(8, 999)
    labels = torch.randint(999, (8,))
    results = []
    for library in (distil_fast, distil_fast.reference):
        logits = student.clone().requires_grad_()
        loss = library.distillation_loss(logits, teacher, labels).loss
        loss.backward()
        results.append((loss, logits.grad))
    torch.testing.assert_close(results[0], results[1])
    assert distil_fast.backends.serving(torch.device("cpu"), torch.float32).name == "native"

    hidden, weight = torch.randn(8, 16, requires_grad=True), torch.randn(999, 16)
    fused = distil_fast.linear_distillation_loss(hidden, weight, hidden.detach() + 0.1, weight, labels).loss
    whole = distil_fast.reference.distillation_loss(hidden @ weight.T, (hidden + 0.1).detach() @ weight.T, labels).loss
    torch.testing.assert_close(fused, whole)
    return float(results[0][0].detach())


def main() -> int:
    package = importlib.util.find_spec("distil_fast")
    assert package is not None
    home = Path(str(package.origin)).parent
    assert home.is_relative_to(sys.prefix), f"{home} is not of this environment, {sys.prefix}"
    version = "{}.{}".format(*sys.version_info)
    if importlib.util.find_spec("torch") is None:
        print(f"wheel: CPython {version}: native module, {native_module()}, no torch here")
        return 0
    loss = losses()
    assert "body" in resources.files("distil_fast.training").joinpath("html_page.css").read_text("utf-8")
    assert resources.files("distil_fast.training").joinpath("presets", "short.yaml").is_file()
    assert importlib.util.find_spec("distil_fast.kernels.divergences") is not None
    print(f"wheel: CPython {version}: imported from {home}, loss {loss:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
