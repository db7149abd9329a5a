"""The code blocks of docs/integrations.md run, in their order, where what they need is installed.

A block's first line may say so: `# needs: a, b`. A name of an earlier block of its section is known to a later one.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.recipes import absent

GUIDE = Path(__file__).parents[2] / "docs" / "integrations.md"


def sections() -> list[Any]:
    """Those with code, by their headings."""
    found = []
    for section in re.split(r"^## ", GUIDE.read_text(), flags=re.MULTILINE)[1:]:
        blocks = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
        if blocks:
            found.append(pytest.param(blocks, id=section.splitlines()[0]))
    return found


@pytest.mark.parametrize("blocks", sections())
def test_a_sections_code_runs(blocks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "guide"}
    for block in blocks:
        lacking = absent(block)
        if lacking:
            pytest.skip(f"needs {', '.join(lacking)}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the hosts'
            exec(compile(block, str(GUIDE), "exec"), names)
