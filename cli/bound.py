"""Run as a script by cli/processes.py: tie this process to the launcher's life, then exec the command.

    python -I -S bound.py LAUNCHER_PID COMMAND...

On Linux the kernel kills the process when the launcher dies, even by SIGKILL; elsewhere this only execs. Popen's
preexec_fn would do the same but is not safe once the launcher has threads.
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
            sys.exit("the launcher died before its child started")
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
