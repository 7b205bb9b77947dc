"""Executed as a script by cli/processes.py: bind this process's life to its launcher's, then become the command.

    python -I -S bound.py LAUNCHER_PID COMMAND...

On Linux the kernel then kills the process when the launcher dies, SIGKILL included. A wrapper that execs, rather
than Popen's preexec_fn, since that one is not safe once the launcher has threads. Elsewhere it only execs.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    launcher, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != int(launcher):
            sys.exit("the launcher died before its child had begun")
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
