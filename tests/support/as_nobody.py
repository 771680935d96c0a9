"""Rights as a user has them, where the tests may run as root."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may open what is closed; whoever runs the tests as root is nobody for a while.

    Modules that the block needs are imported before it: nobody may not be able to read them.
    """
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
