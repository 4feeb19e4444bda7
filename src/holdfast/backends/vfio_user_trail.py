# SPDX-License-Identifier: Apache-2.0
"""What a vfio-user client has done, in memory that outlives it.

Facts. A process can be killed between carrying out a DMA_WRITE of the server and answering it, and
between the answer and taking the message out of the socket. Its successor finds the message there
and cannot tell. To leave it alone would let the function wait in vain. To carry it out again is
right only while the function still waits: once it was answered, the transfer may be complete, and
its memory may have other contents by now, which an old write would destroy. And replies to the
predecessor's requests are told from one's own by nothing but their id.

Choice. One page of shared memory (a memfd), handed over with the socket. It has the id of the last
request, written before the request goes out, so a successor starts behind it. And for each socket
the server's command that is being served, with what has been done about it: *carried out* is noted
before the answer goes out, *answered* after. A note counts only for a message with the same id,
command, address and count.

Cost. A store for each request and four for each DMA message. Between an answer and its note there
is still room for a kill: then the answer is sent twice, which a server has to ignore (it does: an
answer that nobody waits for is dropped). A read is always carried out again unless it was answered:
reading harms nobody. A server that gives all its commands one id could have a command taken for its
like before it if the client is killed between taking the one and clearing the note.
"""

from __future__ import annotations

import enum
import os
from typing import Final

from holdfast.kernel import memfd
from holdfast.kernel.mapping import PAGE, Mapping
from holdfast.wire.vfio_user.client import DmaRequest

_LAST_ID: Final = 0
_FIRST_NOTE: Final = 8
_WORDS: Final = 8
"""64-bit words of a note: what was done, id and command, address, count."""


class Done(enum.IntEnum):
    """What has been done about the server's command at the head of a socket."""

    NOTHING = 0
    CARRIED_OUT = 1
    ANSWERED = 2


class Trail:
    """The page. Owns its descriptor. ``sent`` under the caller's lock; a note by one thread each.

    Every store is one aligned load or store of eight bytes (``kernel.mapping``), so a kill leaves
    the old or the new word, and *what was done* is written last.
    """

    def __init__(self, fd: int | None = None) -> None:
        """Make a page, or go on with a predecessor's: takes ownership of ``fd``, also on error."""
        self.fd = memfd.create("holdfast-vfio-user", PAGE) if fd is None else fd
        try:
            memfd.require_sealed(self.fd, PAGE)
            self._mapping = Mapping(self.fd, PAGE)
        except BaseException:
            os.close(self.fd)
            raise
        self._words = self._mapping.array.data.cast("Q")

    @property
    def last_id(self) -> int:
        """Id of the last request that was, or was about to be, sent; 0 if there was none."""
        return self._words[_LAST_ID]

    def sent(self, ident: int) -> None:
        """A request with this id is about to be sent."""
        self._words[_LAST_ID] = ident

    def done(self, twin: bool, request: DmaRequest) -> Done:
        """What has been done about this command: more than nothing only by a predecessor."""
        at, words = _FIRST_NOTE + _WORDS * twin, self._words
        if tuple(words[at + 1 : at + 4]) != _name(request):
            return Done.NOTHING
        return Done(words[at])

    def carried_out(self, twin: bool, request: DmaRequest) -> None:
        """The command was carried out with success; it is about to be answered."""
        at, words = _FIRST_NOTE + _WORDS * twin, self._words
        words[at] = Done.NOTHING
        words[at + 1], words[at + 2], words[at + 3] = _name(request)
        words[at] = Done.CARRIED_OUT

    def answered(self, twin: bool) -> None:
        """The command that was carried out, if it was, has been answered."""
        at, words = _FIRST_NOTE + _WORDS * twin, self._words
        if words[at] == Done.CARRIED_OUT:
            words[at] = Done.ANSWERED

    def taken(self, twin: bool) -> None:
        """The message is out of the socket: what comes next is another one."""
        self._words[_FIRST_NOTE + _WORDS * twin] = Done.NOTHING

    def close(self) -> None:
        """Let the page go. Idempotent. Nobody may use it meanwhile."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            self._words.release()
            self._mapping.close()
            os.close(fd)


def _name(request: DmaRequest) -> tuple[int, int, int]:
    header, access = request.header, request.access
    return header.msg_id | header.command << 16, access.address, access.count
