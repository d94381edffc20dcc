"""Commands run by a process that has imported everything and forks for each.

Importing torch and transformers takes longer than a tiny run. ``serve`` answers on a Unix socket; a
program made by ``write_program`` hands its arguments, folder, environment and standard streams to
it and exits as the command does.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import socket
import socketserver
import stat
import sys
import traceback
from pathlib import Path

PROGRAM = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
asked = {{"argv": {first!r} + sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
socket.send_fds(server, [json.dumps(asked).encode()], [0, 1, 2])
server.shutdown(socket.SHUT_WR)
sys.exit(int(server.recv(16) or b"1"))
"""


def write_program(path: Path, address: str, *first: str) -> None:
    """An executable at ``path`` that has ``first`` and its own arguments run at ``address``."""
    path.write_text(PROGRAM.format(python=sys.executable, address=address, first=list(first)))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


class Command(socketserver.BaseRequestHandler):
    """One command, in a process of its own."""

    def handle(self) -> None:
        message, streams, _, _ = socket.recv_fds(self.request, 1 << 20, 3)
        while rest := self.request.recv(1 << 20):
            message += rest
        for stream, number in zip(streams, (0, 1, 2), strict=True):
            os.dup2(stream, number)
            os.close(stream)
        asked = json.loads(message)
        os.environ.clear()
        os.environ.update(asked["environment"])
        os.chdir(asked["folder"])
        self.request.sendall(str(status(asked["argv"])).encode())


def status(argv: list[str]) -> int:
    """The exit status of ``-c CODE`` or ``-m MODULE``, as Python would run it."""
    kind, what, *_ = argv
    sys.argv = [kind, *argv[2:]]
    sys.path.insert(0, "")
    try:
        if kind == "-c":
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.modules.pop(what, None)  # else runpy warns
            runpy.run_module(what, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


class Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    """Forks for every command."""


def serve(address: str) -> None:
    """Import what commands need, then run them until killed."""
    import transformers.trainer  # noqa: F401

    import kvdistill.cli
    import kvdistill.pipelines.evaluate
    import kvdistill.pipelines.extract
    import kvdistill.pipelines.train  # noqa: F401

    gc.freeze()  # a collection would cost more than a tiny command, and copy every page
    Server(address, Command).serve_forever()


if __name__ == "__main__":
    serve(sys.argv[1])
