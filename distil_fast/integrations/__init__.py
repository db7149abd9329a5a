"""distil_fast inside the trainers that people already have: one file a host, imported only when you import it.

`distil_fast.integrations.<host>.apply(object)` acts on the object it is given and returns a `Replaced`, whose `undo`
puts the host's own code back; a host that is no longer what the file was written for is refused by `HostChangedError`.
Next: replaced.py for both, docs/integrations.md for what each host means by its loss and what changes.
"""

from distil_fast.integrations.replaced import HostChangedError, Replaced

__all__ = ["HostChangedError", "Replaced"]
