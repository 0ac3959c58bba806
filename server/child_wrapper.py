"""What every child process is at first: it asks the kernel to end it together with its parent, then becomes the child.

A script that runs outside of the package, so it imports the standard library only. Its arguments: the parent's process
id, the signal that ends an orphan, uid and gid to run as (-1: ours), and the child's command line.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Final

_PR_SET_PDEATHSIG: Final = 1


def _become(arguments: list[str]) -> None:
    parent, orphan_signal, uid, gid = map(int, arguments[:4])
    argv = arguments[4:]
    if uid >= 0:
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    # After setuid, which clears it; exec keeps it.
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, orphan_signal, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # A parent that died before that line will send no signal.
    if os.getppid() == parent:
        os.execvp(argv[0], argv)  # noqa: S606 (no shell is wanted)


if __name__ == "__main__":
    try:
        _become(sys.argv[1:])
    except OSError as error:
        sys.exit(f"{sys.argv[5]}: {error}")
